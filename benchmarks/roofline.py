"""The rates that a device reaches, and what a GRPO step takes at least at them: the floor of benchmarks/floor.py, which defines it, and
of benchmarks/accelerator.py."""

import jax
import jax.numpy as jnp
import numpy as np
from timing import median_seconds

from pgjax.config import ModelConfig, Recipe
from pgjax.data.schema import PromptBatch
from pgjax.train.flops import matmul_weights
from pgjax.train.trainable import frozen_tower

PHASES = ("encode", "prefill", "decode", "score", "reward", "update")


def rates(dtype, weight_bytes: int) -> tuple[float, float]:
    """This device's FLOP/s of matmuls and bytes/s of copies."""
    multiply, matmul, n = jax.jit(jnp.matmul), 0.0, 512
    while n <= 8192:
        for rows, inner, columns in ((n, n, n), (4 * n, n, n), (n, 4 * n, n)):
            x, y = jnp.ones((rows, inner), dtype), jnp.ones((inner, columns), dtype)
            seconds = median_seconds(lambda x=x, y=y: multiply(x, y), 3)
            matmul = max(matmul, 2 * rows * inner * columns / seconds)
        n = n * 2 if seconds < 0.5 else 8193
    x = jnp.ones(weight_bytes // 4, jnp.float32)
    negative = jax.jit(jnp.negative)
    return matmul, 2 * x.nbytes / median_seconds(lambda: negative(x), 9)


def tower_pairs(model: ModelConfig, batch: PromptBatch) -> float:
    """Pairs of patches that see each other, summed over the tower's blocks."""
    number_PI, window = np.asarray(batch.image_PI), model.vision.window_patches
    pairs = lambda number: sum(float((row == n).sum()) ** 2 for row in number for n in np.unique(row[row >= 0]))  # noqa: E731
    full = len(model.vision.full_blocks) if model.vision.window else model.vision.depth
    return full * pairs(number_PI) + (model.vision.depth - full) * pairs(number_PI.reshape(-1, window))


def floors(
    recipe: Recipe, batch: PromptBatch, length_PG: np.ndarray, flops: dict[str, float], matmul: float, copy: float
) -> dict[str, float]:
    """Seconds that each phase takes at least; `flops` are train/flops.py's."""
    text, prompt_P = recipe.model.text, np.asarray(batch.length_P, float)
    length_PG = length_PG.astype(float)
    triangle = lambda n: n * (n + 1) / 2  # noqa: E731
    each = 4 * text.head_dim * text.heads * text.layers
    prompts, own = triangle(prompt_P).sum(), triangle(length_PG).sum()
    answers = (prompt_P[:, None] * length_PG).sum() + own
    tower = 4 * recipe.model.vision.width * tower_pairs(recipe.model, batch)
    row = each * (prompts + answers) + (0 if frozen_tower(recipe.model) else tower)
    attention = {"encode": tower, "prefill": each * prompts, "decode": each * answers}
    attention |= {"score": (1 + recipe.grpo.scores_policy) * row, "update": 3 * row}
    seconds = {phase: (flops[phase] + attention.get(phase, 0)) / matmul for phase in PHASES}

    # Tokens sampled one after the other: in a row at least those of its longest answer, and all of them through its lanes.
    lanes, rows = recipe.rollout.lanes or recipe.rollout.group, recipe.rollout.rows or len(prompt_P)
    turns_P = np.maximum(length_PG.max(1), length_PG.sum(1) / lanes)
    turns = max(turns_P.max(), turns_P.sum() / rows)
    size = jnp.dtype(recipe.model.compute_dtype).itemsize
    weights, cached = matmul_weights(recipe.model), 2 * text.kv_heads * text.head_dim * text.layers
    read = turns * (weights.decoder + weights.head) + cached * ((turns_P * prompt_P).sum() + own)
    return seconds | {"decode": max(seconds["decode"], size * read / copy)}
