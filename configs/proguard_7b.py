"""ProGuard-7B as its authors' first public script trained it (PAPERS A9, column OLD), from Qwen2.5-VL-7B-Instruct by GRPO alone.

    pgjax train proguard_7b --checkpoint DIR --data.root DIR --reward.embedder DIR

Not run by us: neither the weights nor that data could be had. Values without a source are marked as our choice.
"""

from pgjax.config import AnswerConfig, DataConfig, GRPOConfig, LossConfig, OODConfig, OptimizerConfig, Recipe, RewardConfig, RolloutConfig
from pgjax.models.released import RELEASED

recipe = Recipe(
    name="proguard_7b",
    model=RELEASED["Qwen2.5-VL-7B"],  # A2; with --checkpoint it is read from there
    data=DataConfig(
        name="jsonl",  # the published rows (A5) in our spelling: docs/data.md
        prompt_tokens=3072,  # A9, max prompt length; longer ones are filtered out, as there
        patches=4096,
        max_pixels=28 * 28 * 768,  # our choice: a picture in at most 768 of the prompt's tokens
        train_examples=87_024,  # A5
        ood=OODConfig(share=0.3),  # our choice: the published share is not known (A6)
    ),
    answer=AnswerConfig(think_tag="think", max_tokens=1024),  # A7, A9
    rollout=RolloutConfig(
        group=16,  # A9, rollout.n
        temperature=1.0,  # verl's default, as top-p 1 and no top-k
        lanes=4,  # our choice, as the next: docs/performance.md has what they waste
        rows=64,
    ),
    reward=RewardConfig(variant="published"),  # A8; its embedder is BGE-M3 by inference (A2): --reward.embedder
    grpo=GRPOConfig(
        steps=169,  # A9: one pass over the rows
        prompts=512,  # A9, train_batch_size
        mini_prompts=32,  # A9, ppo_mini_batch_size
        micro_prompts=32,  # our choice: four prompts with their answers in a row on each of 8 devices, which pads little
        loss=LossConfig(
            clip_low=0.2,  # C6: the script names 0.1, which that version of verl does not use
            clip_high=0.2,
            dual_clip=3.0,  # C5
            kl_coef=0.01,  # A9, k3 in the loss
            kl_in_reward=0.001,  # C3, k1 in the reward
            entropy_coef=0.01,  # A9
            aggregation="token_mean",  # A9
            std="ddof1",  # C4
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, b1=0.9, b2=0.999, weight_decay=0.01, grad_clip=1.0),  # A9 and verl's defaults
        validate_every=10,  # A9, test_freq
        checkpoint_every=10,  # A9, save_freq
    ),
)
