"""A small pretrained language model learns to judge text by GRPO alone (docs/results.md): what benchmarks/study.py varies.

SmolLM2-135M in the decoder of Qwen2.5-VL (examples/smollm2), a built data set of public rows, short prompts. Answers are constrained to
the format: left free, this model keeps to it too rarely for a gradient. Not a guard. On one accelerator; by hand:

    pgjax train study --checkpoint runs/smollm2 --data.root DIR       DIR: what data/build.py wrote
"""

from pathlib import Path

from pgjax.config import AnswerConfig, DataConfig, GRPOConfig, LossConfig, ModelConfig, OODConfig, OptimizerConfig, Recipe, RolloutConfig

recipe = Recipe(
    name="study",
    model=ModelConfig(freeze_vision=True, remat="none"),
    data=DataConfig(
        name="built",
        prompts=str(Path(__file__).parent / "study_prompts"),
        descriptions=False,
        prompt_tokens=320,
        patches=64,  # the least: there are no pictures
        ood=OODConfig(share=0.25, keep=(2, 3)),
    ),
    answer=AnswerConfig(max_tokens=32),  # the longest answer and one token more: no room to think
    rollout=RolloutConfig(group=8, constrained=True),
    grpo=GRPOConfig(
        steps=100,
        prompts=32,
        mini_prompts=32,
        micro_prompts=32,
        loss=LossConfig(kl_coef=0.01, kl_in_reward=0.0, entropy_coef=0.0, agg_eps=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-5, b2=0.98, warmup_steps=5),
        validate_every=50,
        validate_prompts=64,
        checkpoint_every=1000,  # at the end alone
        keep_checkpoints=1,
        keep_best=False,
    ),
    not_a_guard=True,
)
