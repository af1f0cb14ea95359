"""Every recipe is one frozen `Recipe`: a file in configs/ makes it, the command line overrides it.

Constants of the published run stand in PAPERS A9 (hyperparameters) and C (losses); what the
papers leave open is a parameter here, and its comment says that the value is our choice.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class TextConfig:
    """The language decoder; defaults are those of Qwen2.5-VL-7B. Field comments give the axis letter (docs/step.md)."""

    vocab: int = 152064  # V
    width: int = 3584  # D
    layers: int = 28  # L
    heads: int = 28  # H
    kv_heads: int = 4  # K
    head_dim: int = 128  # C
    mlp: int = 18944  # F
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)  # time, height, width; sums to C / 2
    eps: float = 1e-6
    tied: bool = False  # the head is the transposed embedding
    qkv_bias: bool = True  # Qwen2.5
    qk_norm: bool = False  # Qwen3: queries and keys are normalised over C
    mrope_interleaved: bool = False  # Qwen3: frequencies go to time, height, width in turn instead of in sections


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and how pictures become its patches. Lengths `patch` and `window` are in pixels."""

    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp: int = 3420
    patch: int = 14
    temporal: int = 2  # frames folded into one patch; a still image is repeated
    merge: int = 2  # patches merged per side into one visual token
    window: int = 112  # Qwen2.5; 0: every block attends over the whole image
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)  # blocks that attend over the whole image all the same
    positions: int = 0  # Qwen3: side of the learned grid of positions; 0: none
    deepstack: tuple[int, ...] = ()  # Qwen3: blocks whose features join the first decoder layers
    channels: int = 3
    rope_theta: float = 1e4
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in 0 to 1, as CLIP has them
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = 56 * 56  # bounds of a picture's area after resizing
    max_pixels: int = 28 * 28 * 1280

    @property
    def window_side(self) -> int:
        """Patches along the side of a window; without windows, of a merge block."""
        return self.window // self.patch or self.merge

    @property
    def window_patches(self) -> int:
        """Patches in one window, the block length of windowed attention."""
        return self.window_side**2


@dataclass(frozen=True)
class ModelConfig:
    """With a checkpoint, family, text and vision are read from its config.json instead."""

    family: Literal["qwen2_5_vl", "qwen3_vl"] = "qwen2_5_vl"
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # master weights are always float32
    remat: Literal["none", "dots", "attention", "full"] = "full"  # what the backward pass computes anew: models/layers.py
    freeze_vision: bool = False  # the vision tower is not trained: no gradient, and visual tokens once per step
    lora_rank: int = 0  # adapters on the decoder's projections are trained instead of the model; 0: none
    lora_alpha: float = 32.0  # an adapter's output is scaled by alpha / rank


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; `data` is the one that may span slices. -1 takes the rest."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class OODConfig:
    """The OOD task; its published ratios are not known, so all of these are our choice."""

    share: float = 0.3  # of the prompts with a category: the gold one is hidden ("masked" OOD)
    keep: tuple[int, int] | None = None  # smallest and largest number of shown entries; None: all
    shuffle: bool = True  # order of the shown entries
    renumber: bool = False  # shown ids become C1, C2, ... in shown order
    never_seen: tuple[str, ...] = ()  # canonical ids that occur nowhere in training


@dataclass(frozen=True)
class DataConfig:
    # jsonl: your own rows; built: a folder of data/build.py; rewriter: rows of `pgjax synthesize`
    name: Literal["toy", "public_mix", "jsonl", "built", "rewriter"] = "toy"
    root: str | None = None  # where they lie; of public sets the default is $PGJAX_DATA
    taxonomy: str | None = None  # YAML; default the packaged one
    prompts: str | None = None  # folder of templates; default the packaged ones
    descriptions: bool = True  # False: the policy lists names only
    prompt_tokens: int = 3072  # T; longer prompts are dropped when the data is built
    patches: int = 4096  # I, padded, per prompt
    max_pixels: int | None = None  # cap on an image's area; None: the model's own
    train_examples: int = 4096  # rows that are generated; of public data, the most that are taken
    eval_examples: int = 256
    buckets: int = 1  # shapes (T, I) that batches are padded to, chosen from the rows; 1: prompt_tokens and patches. Lessons: sft.buckets
    workers: int = 1  # threads of each process that prepare the rows of a batch
    ood: OODConfig = OODConfig()


@dataclass(frozen=True)
class AnswerConfig:
    think_tag: Literal["think", "thinking"] = "think"
    max_tokens: int = 1024  # R


@dataclass(frozen=True)
class RolloutConfig:
    group: int = 16  # G
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    constrained: bool = False  # only tokens from which the answer can still be completed
    lanes: int = 0  # answers of a prompt that are decoded at a time; 0: all G
    rows: int = 0  # prompts that are decoded at a time, over all devices; 0: all
    oversample: int = 1  # prompts sampled for each that is trained on: groups whose rewards differ go first (DAPO's dynamic sampling)
    packed_step: float = 0.95  # widths of packed rows: each this part of the next, up to whole answers; 0: that one width


@dataclass(frozen=True)
class RewardConfig:
    variant: Literal["published", "strict"] = "strict"
    embedder: str | None = None  # directory of a sentence encoder; None: the MiniLM package
    bank: str | None = None  # file made by `pgjax bank build`; None: built and calibrated at start
    name_tokens: int = 16  # W


@dataclass(frozen=True)
class LossConfig:
    """Defaults are the published run as it ran: clip range 0.2, where the paper says 0.1. LOSS_PRESETS has other algorithms;
    docs/losses.md has every switch with its formula and source."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0  # 0: off
    kl_coef: float = 0.01  # of the KL in the loss
    kl_in_reward: float = 0.001  # of the KL in the reward
    entropy_coef: float = 0.01
    aggregation: Literal["token_mean", "seq_mean", "seq_sum"] = "token_mean"  # seq_sum: over answers times the limit R
    agg_eps: float = 1e-8
    std: Literal["ddof1", "ddof0", "off"] = "ddof1"
    std_eps: float = 1e-6
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of the group, or of its other answers
    kl: Literal["k1", "k2", "k3"] = "k3"  # estimator in the loss; k1 has no gradient on average there
    kl_reward: Literal["k1", "k2", "k3"] = "k1"  # estimator in the reward
    overlong_buffer: int = 0  # the reward falls by up to 1 over the last so many tokens before the limit R; 0: off
    tis_cap: float = 0.0  # truncated importance weights of the scorer over the sampler, at most this; 0: off


# `grpo` is the plain algorithm: one clip, a k3 penalty, exact means, nothing in the reward. The two after it leave the KL out.
# `dapo` wants dynamic sampling beside it (rollout.oversample); its buffer is a fifth of R = 1024, as theirs is of their limit.
_PLAIN = LossConfig(dual_clip=0.0, kl_coef=0.0, kl_in_reward=0.0, entropy_coef=0.0, agg_eps=0.0)
LOSS_PRESETS = {
    "proguard": LossConfig(),
    "grpo": replace(_PLAIN, kl_coef=0.04, aggregation="seq_mean"),
    "dr_grpo": replace(_PLAIN, aggregation="seq_sum", std="off"),
    "dapo": replace(_PLAIN, clip_high=0.28, overlong_buffer=204),
}


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay_updates: int = 0  # over which a cosine or linear schedule falls to 0; 0: all of them
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # global norm; 0: off
    max_skipped: int = 10  # steps in a row whose gradient is no number, and which change nothing; one more ends the run


@dataclass(frozen=True)
class GRPOConfig:
    steps: int = 339
    prompts: int = 256  # P, per step, over all processes
    mini_prompts: int = 32  # prompts per optimiser update
    micro_prompts: int = 32  # prompts per forward and backward, on each device in one packed row; divides mini_prompts
    shares: int = 0  # shares of the batch that deal prompts out to mini-batches by length; 0: one for each shard (data x fsdp)
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    validate_every: int = 10
    validate_prompts: int = 64  # prompts per batch of greedy answers
    checkpoint_every: int = 10
    keep_checkpoints: int = 3  # the newest
    keep_best: bool = True  # and the best: highest held-out request F1 among checkpoints of steps that were validated

    @property
    def scores_policy(self) -> bool:
        """Whether a step computes the logprobs that the policy had before it. With one update a step the policy that samples is the one
        that is updated, so they are the update's own; only a KL in the reward needs them earlier."""
        return self.prompts > self.mini_prompts or self.loss.kl_in_reward != 0


@dataclass(frozen=True)
class WarmUpConfig:
    """A supervised stage before GRPO. Toy only: it gives a model without language the answer format, ids and names drawn
    at random, and the right labels on `label_share` of the prompts. Real recipes set steps = 0 and start pretrained."""

    steps: int = 0
    prompts: int = 32
    answers: int = 1  # supervised answers per prompt, packed like a group
    label_share: float = 0.3
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)


@dataclass(frozen=True)
class SFTConfig:
    """The supervised trainer (`pgjax sft`): what the rewriter is trained by. Its paper gives no value of these: all are our choice."""

    steps: int = 1000
    prompts: int = 32  # P, per step, over all processes
    micro_prompts: int = 32  # prompts per forward and backward, on each device in one packed row; divides prompts
    buckets: int = 3  # shapes (T, I) that prompts are padded to, those that pad the data least: all prompts of a batch to the same
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=30)
    validate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 3  # the newest
    keep_best: bool = True  # and the best: lowest held-out loss


@dataclass(frozen=True)
class ReportConfig:
    show_content: bool = False  # keep texts in samples/ and show them, with pictures, in report.html; toy data always does


@dataclass(frozen=True)
class Recipe:
    name: str = "run"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    checkpoint: str | None = None  # Hugging Face directory to start from; None: random weights
    tokenizer_vocab: int = 0  # size of the byte-level BPE trained on generated data; 0: the checkpoint's
    mesh: MeshConfig = MeshConfig()
    devices: int = 0  # simulated CPU devices, of all processes together; 0: what is there
    data: DataConfig = DataConfig()
    answer: AnswerConfig = AnswerConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    warm_up: WarmUpConfig = WarmUpConfig()
    sft: SFTConfig = SFTConfig()
    grpo: GRPOConfig = GRPOConfig()
    report: ReportConfig = ReportConfig()
    tracker: Literal["none", "wandb", "mlflow"] = "none"  # where metrics go besides the run folder; the package is yours to install
    not_a_guard: bool = False  # toy and demo checkpoints say so in every verdict

    @property
    def shows_content(self) -> bool:
        """Whether samples and report may hold what people wrote."""
        return self.data.name == "toy" or self.report.show_content
