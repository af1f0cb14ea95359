"""The toy rewriter: about a million parameters that learn to copy a request, or to exchange its one risky word, from what
`pgjax synthesize` made of toy requests with pictures. A minute or two on two CPU cores.

    pgjax sft toy_rewriter --data.root DIR

Not a guard: its checkpoints say so. Two simulated devices, since two cores then never wait for each other within an operation.
"""

from pgjax.config import AnswerConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, Recipe, SFTConfig, TextConfig, VisionConfig

recipe = Recipe(
    name="toy_rewriter",
    model=ModelConfig(
        text=TextConfig(  # three layers: two learn to copy too, but later
            vocab=1536, width=128, layers=3, heads=4, kv_heads=2, head_dim=32, mlp=384, mrope_section=(4, 6, 6), rope_theta=1e4, tied=True
        ),
        vision=VisionConfig(width=64, depth=2, heads=2, mlp=128, window=56, full_blocks=(1,)),
        compute_dtype="float32",
        remat="none",
    ),
    tokenizer_vocab=1536,
    mesh=MeshConfig(data=2, fsdp=1),
    devices=2,
    data=DataConfig(name="rewriter", prompt_tokens=256, patches=64),
    answer=AnswerConfig(max_tokens=128),
    sft=SFTConfig(
        steps=200,
        prompts=16,
        micro_prompts=16,
        buckets=1,  # toy prompts are alike in length, and each bucket is a program to compile
        optimizer=OptimizerConfig(learning_rate=3e-3, b2=0.98, schedule="cosine", warmup_steps=20),
        validate_every=50,
        checkpoint_every=100,
    ),
    not_a_guard=True,
)
