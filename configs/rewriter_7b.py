"""VLMGuard-R1's rewriter (PAPERS B): a Qwen vision-language model of 7B, fine-tuned on what `pgjax synthesize` made.

    pgjax sft rewriter_7b --checkpoint DIR --data.root DIR

Not run by us: neither the weights nor data of that size could be had. The paper fine-tunes Qwen2-VL-7B-Instruct on 9,881 rows (B3, B4), of
which 977 are harmless; we start from its successor Qwen2.5-VL-7B-Instruct. No hyperparameter is published: all of them are our choice.
"""

import dataclasses

from pgjax.config import AnswerConfig, DataConfig, OptimizerConfig, Recipe, SFTConfig
from pgjax.models.released import RELEASED

recipe = Recipe(
    name="rewriter_7b",
    model=dataclasses.replace(RELEASED["Qwen2.5-VL-7B"], freeze_vision=True),  # with --checkpoint the rest is read from there
    data=DataConfig(
        name="rewriter",
        prompt_tokens=2048,  # a request of a thousand words and a picture
        patches=4096,
        max_pixels=28 * 28 * 768,  # as configs/proguard_7b.py: a picture in at most 768 tokens
    ),
    answer=AnswerConfig(max_tokens=768),  # a report of three parts, and the prompt anew
    sft=SFTConfig(
        steps=462,  # about three epochs of the paper's 9,881 rows
        prompts=64,
        micro_prompts=32,  # on 8 devices four prompts in a row with their answers
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=15, weight_decay=0.0, grad_clip=1.0),
        validate_every=50,
        checkpoint_every=50,
    ),
    not_a_guard=True,  # its export says so too
)
