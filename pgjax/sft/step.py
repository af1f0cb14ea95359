"""The supervised step: raise the log-probability of given answers, each token by its weight. It shares rows, scoring and update with
GRPO; what the warm-up of a toy recipe and the trainer differ in is where answers and weights come from.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from pgjax.data.schema import PromptBatch
from pgjax.generate.law import Law
from pgjax.generate.score import pack, pack_values, score
from pgjax.parallel.mesh import replicated
from pgjax.parallel.program import Program
from pgjax.train.setup import Setup
from pgjax.train.trainable import merge
from pgjax.train.update import update


@struct.dataclass
class Taught:
    """Prompts and the answers that they should get. Leading axis P, or [rows, n]: n prompts a row, one after another."""

    prompt: PromptBatch
    tokens_PGR: jax.Array  # int32
    length_PG: jax.Array  # int32, stop token included
    weight_PGR: jax.Array  # float32, what a token counts in the loss; 0 past the end of an answer

    def by_row(self, prompts: int) -> "Taught":
        return jax.tree.map(lambda x: x.reshape(-1, prompts, *x.shape[1:]), self)


def taught(prompt: PromptBatch, tokens_PGR: np.ndarray, length_PG: np.ndarray, weight: np.ndarray | float = 1.0) -> Taught:
    """As numpy arrays; `weight` is broadcast to the answers' tokens."""
    inside = np.arange(tokens_PGR.shape[-1]) < length_PG[..., None]
    return Taught(prompt, tokens_PGR, length_PG, np.where(inside, weight, 0).astype(np.float32))


def loss_pair(setup: Setup, law: Law, params: dict, rows: Taught, width: int) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p over the answers' tokens, and of the weights. `rows` [rows, n, ...]; a row has `width` slots for answers."""
    prompts = rows.length_PG.shape[1]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    packed = pack(flat.tokens_PGR, jnp.zeros_like(flat.tokens_PGR), flat.length_PG, width, prompts)
    weight_PQ = pack_values(flat.weight_PGR, packed)
    logp_PQ, _ = score(setup.model, params, flat.prompt, packed, law, entropy=False)
    return -(logp_PQ * weight_PQ).sum(), weight_PQ.sum()


def make_step(
    setup: Setup, law: Law, optimizer: optax.GradientTransformation, name: str, prompts: int = 1, micro_batches: int = 1
) -> Callable[..., Any]:
    """Jitted (state, frozen, taught, width=) -> (state, metrics): one update, `prompts` prompts a row; `state` is donated. `frozen` are
    the parameters that are not trained. The loss, a mean over the whole batch, is the metric `name`."""

    def step(state, frozen: dict, batch: Taught, width: int):
        def loss_sum(trained: dict, micro: Taught):
            pair = loss_pair(setup, law, merge(trained, frozen), micro, width)
            return pair[0], {name: pair}

        return update(state, optimizer, loss_sum, batch.by_row(prompts), batch.weight_PGR.sum(), micro_batches)

    placed = setup.state_shardings(optimizer), replicated(setup.mesh)
    return Program(jax.jit(step, static_argnames="width", donate_argnums=0, out_shardings=placed), placed, setup.mesh)


def make_loss(setup: Setup, law: Law, prompts: int) -> Callable[..., Any]:
    """Jitted (trained, frozen, taught, width=) -> `loss_pair` of a batch."""

    def loss(trained: dict, frozen: dict, batch: Taught, width: int):
        return loss_pair(setup, law, merge(trained, frozen), batch.by_row(prompts), width)

    placed = replicated(setup.mesh)
    return Program(jax.jit(loss, static_argnames="width", out_shardings=placed), placed, setup.mesh)
