"""The toy's model on public data: texts of two sets with both labels, and typographic pictures (docs/results.md).

`pgjax train public_mix --data.root DIR`, where DIR holds openai_moderation, surge_toxicity, figstep and mossbench (the last is for
evaluation only). Not a guard: a model of about a million parameters that has never seen other language.
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
    SFTConfig,
    TextConfig,
    VisionConfig,
)

recipe = Recipe(
    name="public_mix",
    model=ModelConfig(
        text=TextConfig(
            vocab=3072, width=128, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=384, mrope_section=(4, 6, 6), rope_theta=1e4, tied=True
        ),
        vision=VisionConfig(width=64, depth=2, heads=2, mlp=128, window=56, full_blocks=(1,)),
        compute_dtype="float32",
        remat=False,
    ),
    tokenizer_vocab=3072,
    mesh=MeshConfig(data=2, fsdp=1, tensor=1),
    devices=2,  # keeps two cores busier than one device does
    data=DataConfig(
        name="public_mix",
        prompts=str(Path(__file__).parent / "toy_prompts"),
        descriptions=False,
        prompt_tokens=320,
        patches=96,  # a picture of any usual shape in windows that it does not fill
        max_pixels=112 * 112,  # at most 64 patches, 16 visual tokens; a line of a FigStep title is then 11 pixels high
        train_examples=4096,  # more than there are, as eval_examples
        eval_examples=4096,
        ood=OODConfig(share=0.25, keep=(2, 3)),
    ),
    answer=AnswerConfig(max_tokens=36),
    rollout=RolloutConfig(group=8),
    reward=RewardConfig(name_tokens=12),
    sft=SFTConfig(
        steps=240, prompts=16, label_share=0.5, optimizer=OptimizerConfig(learning_rate=4e-3, b2=0.98, schedule="cosine", warmup_steps=10)
    ),
    grpo=GRPOConfig(
        steps=200,
        prompts=16,
        mini_prompts=16,
        micro_prompts=16,
        loss=LossConfig(kl_coef=0.01, kl_in_reward=0.0, entropy_coef=0.01, agg_eps=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, b2=0.98, warmup_steps=5),
        validate_every=100,
        validate_prompts=64,
        checkpoint_every=50,
    ),
    not_a_guard=True,
)
