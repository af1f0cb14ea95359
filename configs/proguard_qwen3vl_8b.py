"""The authors' later script (PAPERS A9, column HEAD): Qwen3-VL-8B-Instruct, half the batch, another tag.

pgjax train proguard_qwen3vl_8b --checkpoint DIR --data.root DIR --reward.embedder DIR
"""

from dataclasses import replace
from pathlib import Path

from pgjax.config import AnswerConfig
from pgjax.models.released import RELEASED
from pgjax.recipes import load_recipe

base = load_recipe(str(Path(__file__).with_name("proguard_7b.py")))
recipe = replace(
    base,
    name="proguard_qwen3vl_8b",
    model=RELEASED["Qwen3-VL-8B"],  # A2
    data=replace(base.data, max_pixels=32 * 32 * 1024),  # our choice: at most 1024 visual tokens, which fill data.patches
    answer=AnswerConfig(think_tag="thinking", max_tokens=1024),  # A7: what this script's reward asks for
    grpo=replace(
        base.grpo,
        steps=339,  # A9
        prompts=256,  # A9
        validate_every=40,  # A9
        checkpoint_every=40,  # A9
    ),
)
