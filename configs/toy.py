"""The demo: a guard of about a million parameters on generated data, trained on eight simulated CPU devices in minutes.

Not a guard: its checkpoints say so. What is small is the model and the data; every program is the one that a large recipe runs.
"""

from pathlib import Path

from pgjax.config import (
    AnswerConfig,
    DataConfig,
    GRPOConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OODConfig,
    OptimizerConfig,
    Recipe,
    RewardConfig,
    RolloutConfig,
    TextConfig,
    VisionConfig,
    WarmUpConfig,
)

recipe = Recipe(
    name="toy",
    model=ModelConfig(
        text=TextConfig(
            vocab=1536, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=384, mrope_section=(4, 6, 6), rope_theta=1e4, tied=True
        ),
        vision=VisionConfig(width=64, depth=2, heads=2, mlp=128, window=56, full_blocks=(1,)),
        compute_dtype="float32",
        remat="none",
    ),
    tokenizer_vocab=1536,
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    devices=8,
    data=DataConfig(
        prompts=str(Path(__file__).parent / "toy_prompts"),  # a few words instead of the packaged templates, for shorter prompts
        descriptions=False,
        prompt_tokens=160,
        patches=64,
        train_examples=2048,
        eval_examples=128,
        ood=OODConfig(share=0.25, keep=(2, 3), renumber=True, never_seen=("C5", "C6")),
    ),
    answer=AnswerConfig(max_tokens=36),
    rollout=RolloutConfig(group=8),
    reward=RewardConfig(name_tokens=12),
    warm_up=WarmUpConfig(  # ends while labels are being learnt: the rest is left to GRPO
        steps=75,
        prompts=16,
        optimizer=OptimizerConfig(learning_rate=4e-3, b2=0.98, schedule="cosine", decay_updates=120, warmup_steps=10),
    ),
    grpo=GRPOConfig(
        steps=75,
        prompts=8,
        mini_prompts=8,
        micro_prompts=8,
        loss=LossConfig(kl_coef=0.01, kl_in_reward=0.0, entropy_coef=0.01, agg_eps=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, b2=0.98, warmup_steps=5),
        validate_every=25,
        validate_prompts=64,
        checkpoint_every=50,
    ),
    not_a_guard=True,
)
