"""What the phases of a step compute, by the convention of model FLOP utilisation (MFU): docs/performance.md has the definition.

Two floating-point operations for every matmul parameter and token, three times that where gradients are taken; attention scores,
padding, recomputation and slots of lanes that stand idle do not count. Prompts count once, whatever their group.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from pgjax.config import ModelConfig, Recipe
from pgjax.models.qwen_vl import QwenVL, init_boxed
from pgjax.train.trainable import frozen_tower

# Dense bfloat16 peaks of one device, FLOP/s, as their makers give them, by the start of JAX's name for it; the longest that fits counts.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class Weights(NamedTuple):
    """Matmul parameters: of the decoder without embedding and head, of the head, and of the vision tower for each patch."""

    decoder: int
    head: int
    tower: float


def matmul_weights(config: ModelConfig) -> Weights:
    shapes = jax.eval_shape(lambda key: nn.meta.unbox(init_boxed(QwenVL(config), key)), jax.random.key(0))
    sizes = {"/".join(path): int(np.prod(leaf.shape)) for path, leaf in flatten_dict(shapes).items() if path[-1] == "kernel"}
    of = lambda start: sum(size for path, size in sizes.items() if path.startswith(start))  # noqa: E731
    mergers = sum(size for path, size in sizes.items() if path.startswith("visual/") and "merger" in path)
    return Weights(of("model/"), config.text.vocab * config.text.width, of("visual/") - mergers + mergers / config.vision.merge**2)


def peak(device: jax.Device) -> float | None:
    """FLOP/s of a device; None where it is not known."""
    fitting = [name for name in PEAKS if device.device_kind.startswith(name)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def rates(name: str, seconds: float, tokens: float, flops: float, devices: int, peak: float | None) -> dict[str, float]:
    """Time, tokens a second, FLOPs and, where the peak of a device is known, MFU of one phase."""
    time = max(seconds, 1e-9)
    metrics = {f"timing_s/{name}": seconds, f"perf/tokens_per_s/{name}": tokens / time, f"perf/flops/{name}": flops}
    return metrics | ({f"perf/mfu/{name}": flops / (time * devices * peak)} if peak else {})


def passes(config: ModelConfig) -> int:
    """How often an update does what a forward pass does. With adapters the gradient of what they stand on is not taken."""
    return 2 if config.lora_rank else 3


def supervised_flops(config: ModelConfig, weights: Weights, patches: float, prompt: float, answer: float) -> float:
    """Of one update on so many patches and tokens of prompts and answers. A frozen tower is passed once."""
    forward = 2 * weights.decoder * (prompt + answer) + 2 * weights.head * answer
    return passes(config) * forward + (1 if frozen_tower(config) else passes(config)) * 2 * weights.tower * patches


def phase_metrics(
    recipe: Recipe, weights: Weights, seconds: Mapping[str, float], counts: Mapping[str, float], devices: int, peak: float | None
) -> dict[str, float]:
    """`rates` of every phase of a GRPO step, and its time.

    `counts` are of what was sampled (`patches`, `prompt`, `response`) and of what was trained on (`trained_...`).
    """
    config, scored = recipe.model, 1 + recipe.grpo.scores_policy  # by the reference, and by the policy
    frozen = frozen_tower(config)
    prompt, response = counts["trained_prompt"], counts["trained_response"]
    tower = 2 * weights.tower * (0 if frozen else counts["trained_patches"])
    forward = 2 * weights.decoder * (prompt + response) + 2 * weights.head * response + tower
    tokens_flops = {
        "encode": (counts["patches"], 2 * weights.tower * counts["patches"]),
        "prefill": (counts["prompt"], 2 * weights.decoder * counts["prompt"]),
        "decode": (counts["response"], 2 * (weights.decoder + weights.head) * counts["response"]),
        "score": (scored * (prompt + response), scored * forward),
        "reward": (counts["response"], 0),
        "update": (prompt + response, passes(config) * forward),
    }
    metrics = {"perf/time_per_step": seconds["step"]}
    for phase, (tokens, flops) in tokens_flops.items():
        metrics |= rates(phase, seconds[phase], tokens, flops, devices, peak)
    return metrics
