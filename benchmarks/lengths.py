"""Laws of answers' lengths, and decoding that keeps to one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from scipy.stats import expon, lognorm

from pgjax.generate import law as laws

LAWS = ("equal", "lognormal", "exponential", "bimodal", "uniform")
MEAN = 300 / 1024  # of the limit, unless it is told


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


@contextmanager
def forced(lengths: np.ndarray, stop_V: np.ndarray) -> Iterator[None]:
    """Programs that are traced inside sample as ever, but every answer stops when it is as long as its key draws from `lengths`, neither
    before nor after: how long the answers are depends on step, prompt and sample alone."""
    sample, stop, number = laws.sample, int(np.argmax(stop_V)), len(lengths)

    def until_length(logp_NSV, key_NS, offset_NS, greedy, top_k, top_p):
        draw = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, number)))
        length_NS = jnp.asarray(lengths)[draw(key_NS)]
        token_NS = sample(jnp.where(stop_V, laws.BLOCKED, logp_NSV), key_NS, offset_NS, greedy, top_k, top_p)
        return jnp.where(offset_NS + 1 >= length_NS, stop, token_NS)

    with mock.patch.object(laws, "sample", until_length):
        yield
