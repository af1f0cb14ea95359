"""Score given answers: the answers of a group are packed back to back behind their prompt, one row per prompt (DESIGN idea 1)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.data.schema import PromptBatch
from pgjax.generate import law as laws
from pgjax.generate.decode import encode
from pgjax.generate.law import Law
from pgjax.models.attention import Row
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.vision import Visual
from pgjax.parallel.mesh import constrain


@struct.dataclass
class Packed:
    """Answers of a group back to back. `sample_PQ` -1 marks slots that hold none."""

    tokens_PQ: jax.Array  # int32
    sample_PQ: jax.Array  # int32, which answer
    offset_PQ: jax.Array  # int32, position in it
    state_PQ: jax.Array  # int32, automaton state before the token
    block: int = struct.field(pytree_node=False)  # R: no answer is longer, and it divides Q

    @property
    def mask_PQ(self) -> jax.Array:
        return (self.sample_PQ >= 0).astype(jnp.float32)


def packed_width(longest: int, limit: int, buckets: tuple[int, ...], group: int) -> int:
    """The smallest bucket of Q that holds `longest` tokens; every bucket is a multiple of the answer limit R."""
    widths = sorted({-(-b // limit) * limit for b in buckets} | {group * limit})
    return next(w for w in widths if w >= longest)


def answer_rows(ids_PG: Sequence[Sequence[Sequence[int]]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of answers as int32 [P, G, R], `limit` R, and lengths [P, G]. ValueError for an answer that is too long."""
    length_PG = np.array([[len(ids) for ids in group] for group in ids_PG], np.int32)
    if length_PG.max() > limit:
        raise ValueError(f"an answer has {length_PG.max()} tokens, more than answer.max_tokens {limit}")
    tokens_PGR = np.zeros((*length_PG.shape, limit), np.int32)
    tokens_PGR[np.arange(limit) < length_PG[..., None]] = [id for group in ids_PG for ids in group for id in ids]
    return tokens_PGR, length_PG


def pack(tokens_PGR: jax.Array, state_PGR: jax.Array, length_PG: jax.Array, width: int) -> Packed:
    """[P, G, R] answers -> packed rows of `width` slots. Lengths in tokens, stop token included."""
    P, G, R = tokens_PGR.shape
    end_PG = jnp.cumsum(length_PG, axis=1)
    slot_PQ = jnp.broadcast_to(jnp.arange(width), (P, width))
    sample_PQ = jnp.sum(slot_PQ[:, :, None] >= end_PG[:, None, :], axis=-1)
    inside, sample_PQ = sample_PQ < G, jnp.minimum(sample_PQ, G - 1)
    offset_PQ = slot_PQ - jnp.take_along_axis(end_PG - length_PG, sample_PQ, axis=1)
    index_PQ = jnp.clip(sample_PQ * R + offset_PQ, 0, G * R - 1)
    take = lambda x: jnp.where(inside, jnp.take_along_axis(x.reshape(P, G * R), index_PQ, axis=1), 0)  # noqa: E731
    return Packed(take(tokens_PGR), jnp.where(inside, sample_PQ, -1), jnp.where(inside, offset_PQ, 0), take(state_PGR), R)


def per_answer(value_PQ: jax.Array, packed: Packed, group: int) -> jax.Array:
    """Sum of packed token values over each answer. [P, Q] -> [P, G]"""
    return jnp.einsum("pq,pqg->pg", value_PQ, jax.nn.one_hot(packed.sample_PQ, group))


def score(
    model: QwenVL, params, batch: PromptBatch, packed: Packed, law: Law, visual: Visual | None = None, *, chunk=1024, entropy=True
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every packed answer token, float32 [P, Q] each; 0 in empty slots.

    Logits exist for `chunk` tokens of each row at a time (recomputed in the backward pass), never for a whole row.
    `visual` are the prompts' visual tokens where they are known already (a frozen tower).
    """
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731
    (P, T), Q = batch.tokens_PT.shape, packed.tokens_PQ.shape[1]
    visual = encode(model, params, batch) if visual is None else visual
    prompt = apply(batch.tokens_PT, batch.visual_PT, visual, method="embed")
    x = constrain(jnp.concatenate([prompt, apply(packed.tokens_PQ, method="embed")], axis=1), "batch", None, None)
    position_PQ = (batch.length_P + batch.delta_P)[:, None] + packed.offset_PQ
    position = jnp.concatenate([batch.position_PTX, jnp.broadcast_to(position_PQ[..., None], (P, Q, 3))], axis=1)
    row = Row(batch.length_P, packed.sample_PQ, T, packed.block)
    hidden = apply(x, position, row, batch.visual_PT, visual, method="rows")
    # A token's logits come from the slot before it; an answer's first token from the prompt's last, whose gradient sums over the group.
    first = packed.offset_PQ == 0
    source_PQ = jnp.where(first, jnp.maximum(batch.length_P - 1, 0)[:, None], T + jnp.arange(Q) - 1)
    hidden_PQD = jnp.take_along_axis(hidden, source_PQ[..., None], axis=1)

    def head(hidden, tokens, state, offset):
        logp = laws.log_probs(law, apply(hidden, method="logits"), state, offset)
        taken = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
        return taken, -jnp.sum(jnp.exp(logp) * logp, axis=-1) if entropy else jnp.zeros_like(taken)

    args = (hidden_PQD, packed.tokens_PQ, packed.state_PQ, packed.offset_PQ)
    if Q <= chunk or Q % chunk:
        logp, spread = jax.checkpoint(head)(*args)
    else:
        split = lambda a: jnp.moveaxis(a.reshape(P, Q // chunk, chunk, *a.shape[2:]), 1, 0)  # noqa: E731
        join = lambda a: jnp.moveaxis(a, 0, 1).reshape(P, Q)  # noqa: E731
        logp, spread = map(join, jax.lax.map(jax.checkpoint(lambda a: head(*a)), tuple(map(split, args))))
    return logp * packed.mask_PQ, spread * packed.mask_PQ
