"""Prompts of a length, laws of answers' lengths, and decoding that keeps to one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.stats import expon, lognorm

from pgjax.data.schema import PromptBatch
from pgjax.generate import law as laws
from pgjax.models.qwen_vl import QwenVL, patch_values

LAWS = ("equal", "lognormal", "exponential", "bimodal", "uniform")
MEAN = 300 / 1024  # of the limit, unless it is told


def text_prompts(model: QwenVL, P: int, T: int) -> PromptBatch:
    """Prompts of T random tokens each, without a picture."""
    I, tokens_PT = model.config.vision.window_patches, np.random.default_rng(0).integers(3, model.config.text.vocab - 3, (P, T), np.int32)
    zeros = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    position_PTX = np.broadcast_to(np.arange(T, dtype=np.int32)[:, None], (P, T, 3))
    patches_PIB = np.zeros((P, I, patch_values(model.config)), np.float32)
    visual = np.full((P, T), -1, np.int32), patches_PIB, zeros(P, I, 2), zeros(P, I, 2), np.full((P, I), -1, np.int32)
    return PromptBatch(tokens_PT, np.full(P, T, np.int32), position_PTX, zeros(P), *visual, np.arange(P, dtype=np.uint32))


def quantiles(law: str, limit: int, mean: float | None = None, n: int = 4096) -> np.ndarray:
    """The n quantiles of a law of lengths, int32, rising: drawing one at random draws a length of 1 to `limit`.

    Lognormal (sigma 0.6) and exponential are cut at the limit and have the mean with the cut. Bimodal: one in five at the limit, the
    rest alike. Uniform from 1 to twice the mean.
    """
    mean = mean or MEAN * limit
    u = (np.arange(n) + 0.5) / n
    if law in ("lognormal", "exponential"):
        shape = lognorm.ppf(u, 0.6) if law == "lognormal" else expon.ppf(u)
        cut = lambda scale: np.minimum(scale * shape, limit)  # noqa: E731
        lengths = cut(brentq(lambda scale: cut(scale).mean() - mean, 0, 1e3 * limit))
    elif law == "bimodal":
        lengths = np.where(u < 0.8, (mean - 0.2 * limit) / 0.8, limit)
    else:
        lengths = np.full(n, mean) if law == "equal" else 0.5 + u * 2 * mean
    return np.clip(np.rint(lengths), 1, limit).astype(np.int32)


def drawn(lengths: np.ndarray, key_NS: jax.Array) -> jax.Array:
    """The length that each key draws."""
    return jnp.asarray(lengths)[jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(lengths))))(key_NS)]


@contextmanager
def forced(lengths: np.ndarray, stop_V: np.ndarray) -> Iterator[None]:
    """Programs that are traced inside sample as ever, but every answer stops when it is as long as its key draws from `lengths`, neither
    before nor after: how long the answers are depends on step, prompt and sample alone."""
    sample, stop = laws.sample, int(np.argmax(stop_V))

    def until_length(logp_NSV, key_NS, offset_NS, greedy, top_k, top_p):
        token_NS = sample(jnp.where(stop_V, laws.BLOCKED, logp_NSV), key_NS, offset_NS, greedy, top_k, top_p)
        return jnp.where(offset_NS + 1 >= drawn(lengths, key_NS), stop, token_NS)

    with mock.patch.object(laws, "sample", until_length):
        yield
