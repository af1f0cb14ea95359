"""Score given answers, packed back to back behind their prompts: each prompt stands once, whatever its group (DESIGN idea 1).

A row holds n prompts and the answers of all their groups. Rows whose sums are alike need little padding: `balanced` chooses them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.data.schema import PromptBatch
from pgjax.generate import law as laws
from pgjax.generate.decode import encode
from pgjax.generate.law import Law
from pgjax.models.attention import EMPTY, Segments
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.vision import Visual
from pgjax.parallel.mesh import constrain


@struct.dataclass
class Packed:
    """Answers of n prompts back to back, n * G in a row of Q slots. `sample_PQ` -1 marks slots that hold none. P counts rows."""

    tokens_PQ: jax.Array  # int32
    sample_PQ: jax.Array  # int32, which of the row's answers
    offset_PQ: jax.Array  # int32, position in it
    state_PQ: jax.Array  # int32, automaton state before the token
    group: int = struct.field(pytree_node=False)  # G: sample // G says which of the row's prompts

    @property
    def mask_PQ(self) -> jax.Array:
        return (self.sample_PQ >= 0).astype(jnp.float32)

    @property
    def prompt_PQ(self) -> jax.Array:
        return jnp.maximum(self.sample_PQ, 0) // self.group


def packed_width(longest: int, most: int, step: float) -> int:
    """The smallest width Q that holds `longest` tokens: `most`, or one of a falling series of which each is `step` of the one before."""
    width = most
    while 8 <= (narrower := int(width * step) // 8 * 8) < width and narrower >= longest:
        width = narrower
    return width


def answer_rows(ids_PG: Sequence[Sequence[Sequence[int]]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of answers as int32 [P, G, R], `limit` R, and lengths [P, G]. ValueError for an answer that is too long."""
    length_PG = np.array([[len(ids) for ids in group] for group in ids_PG], np.int32)
    if length_PG.max() > limit:
        raise ValueError(f"an answer has {length_PG.max()} tokens, more than answer.max_tokens {limit}")
    tokens_PGR = np.zeros((*length_PG.shape, limit), np.int32)
    tokens_PGR[np.arange(limit) < length_PG[..., None]] = [id for group in ids_PG for ids in group for id in ids]
    return tokens_PGR, length_PG


def pack(tokens_PGR: jax.Array, state_PGR: jax.Array, length_PG: jax.Array, width: int, prompts: int = 1) -> Packed:
    """[P, G, R] answers -> rows of `width` slots for `prompts` prompts each, in their order. Lengths in tokens, stop token included."""
    _, G, R = tokens_PGR.shape
    length_PG = length_PG.reshape(-1, prompts * G)
    P, answers = length_PG.shape
    end_PG = jnp.cumsum(length_PG, axis=1)
    slot_PQ = jnp.broadcast_to(jnp.arange(width), (P, width))
    sample_PQ = jnp.sum(slot_PQ[:, :, None] >= end_PG[:, None, :], axis=-1)
    inside, sample_PQ = sample_PQ < answers, jnp.minimum(sample_PQ, answers - 1)
    offset_PQ = slot_PQ - jnp.take_along_axis(end_PG - length_PG, sample_PQ, axis=1)
    index_PQ = jnp.clip(sample_PQ * R + offset_PQ, 0, answers * R - 1)
    take = lambda x: jnp.where(inside, jnp.take_along_axis(x.reshape(P, answers * R), index_PQ, axis=1), 0)  # noqa: E731
    return Packed(take(tokens_PGR), jnp.where(inside, sample_PQ, -1), jnp.where(inside, offset_PQ, 0), take(state_PGR), G)


def pack_values(value_PGR: jax.Array, packed: Packed) -> jax.Array:
    """Values per answer token [P, G, R] at their packed slots [P, Q]; 0 in empty slots."""
    rows, R = packed.tokens_PQ.shape[0], value_PGR.shape[-1]
    value_PB = value_PGR.reshape(rows, -1)
    index_PQ = jnp.clip(packed.sample_PQ * R + packed.offset_PQ, 0, value_PB.shape[1] - 1)
    return jnp.take_along_axis(value_PB, index_PQ, axis=1) * packed.mask_PQ


def balanced(tokens_P: jax.Array, prompts: int) -> jax.Array:
    """Order int32 [P] in which every `prompts` prompts that follow each other have about the same number of tokens together: the
    longest begin the rows; of the next longest the longest goes where least is, and so on."""
    by_length = jnp.argsort(-tokens_P, stable=True).reshape(prompts, -1)
    rows = by_length[0][:, None]
    for longest_first in by_length[1:]:
        least_first = jnp.argsort(tokens_P[rows].sum(axis=1), stable=True)
        rows = jnp.concatenate([rows[least_first], longest_first[:, None]], axis=1)
    return rows.reshape(-1)


def per_answer(value_PQ: jax.Array, packed: Packed, group: int) -> jax.Array:
    """Sum of packed token values over each answer. [P, Q] -> [P, G]"""
    return jnp.einsum("pq,pqg->pg", value_PQ, jax.nn.one_hot(packed.sample_PQ, group))


def _row_segments(batch: PromptBatch, packed: Packed) -> Segments:
    """Slots [0, n T) hold the row's prompts, each right-padded, the rest its packed answers."""
    (P, T), (rows, _) = batch.tokens_PT.shape, packed.tokens_PQ.shape
    order = jnp.broadcast_to(jnp.arange(T), (rows, P // rows, T))
    prompt = jnp.where(order < batch.length_P.reshape(rows, -1, 1), jnp.arange(P // rows)[:, None], EMPTY).reshape(rows, -1)
    group = jnp.concatenate([prompt, jnp.where(packed.sample_PQ >= 0, packed.prompt_PQ, EMPTY)], axis=1)
    sample = jnp.concatenate([jnp.full_like(prompt, EMPTY), packed.sample_PQ], axis=1)
    return Segments(group, sample, jnp.concatenate([order.reshape(rows, -1), T + packed.offset_PQ], axis=1))


def score(
    model: QwenVL, params, batch: PromptBatch, packed: Packed, law: Law, visual: Visual | None = None, *, chunk=1024, entropy=True
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every packed answer token, float32 [rows, Q] each; 0 in empty slots.

    `batch` has the rows' prompts one after another, P = rows * n. Logits exist for at most `chunk` tokens of each row at a time
    (recomputed in the backward pass), never for a whole row. `visual` are the prompts' visual tokens where they are known already (a
    frozen tower).
    """
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731
    (P, T), (rows, Q) = batch.tokens_PT.shape, packed.tokens_PQ.shape
    by_row = lambda x: x.reshape(rows, -1, *x.shape[2:])  # noqa: E731
    visual = encode(model, params, batch) if visual is None else visual
    prompt = by_row(apply(batch.tokens_PT, batch.visual_PT, visual, method="embed"))
    x = constrain(jnp.concatenate([prompt, apply(packed.tokens_PQ, method="embed")], axis=1), "batch", None, None)
    first_P = batch.length_P + batch.delta_P  # position of a prompt's first answer token
    position_PQ = _of_prompt(first_P, packed) + packed.offset_PQ
    position = jnp.concatenate([by_row(batch.position_PTX), jnp.broadcast_to(position_PQ[..., None], (rows, Q, 3))], axis=1)
    hidden = apply(x, position, _row_segments(batch, packed), *visual.by_row(batch.visual_PT, rows), method="rows")
    # A token's logits come from the slot before it; an answer's first token from the prompt's last, whose gradient sums over the group.
    last_PQ = packed.prompt_PQ * T + jnp.maximum(_of_prompt(batch.length_P, packed) - 1, 0)
    source_PQ = jnp.where(packed.offset_PQ == 0, last_PQ, P // rows * T + jnp.arange(Q) - 1)
    hidden_PQD = jnp.take_along_axis(hidden, source_PQ[..., None], axis=1)

    def head(hidden, tokens, state, offset, prompt):
        logp = laws.log_probs(law, apply(hidden, method="logits"), state, offset, prompt)
        taken = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
        return taken, -jnp.sum(jnp.exp(logp) * logp, axis=-1) if entropy else jnp.zeros_like(taken)

    args = (hidden_PQD, packed.tokens_PQ, packed.state_PQ, packed.offset_PQ, packed.prompt_PQ)
    parts = -(-Q // chunk)
    size = -(-Q // parts)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, parts * size - Q)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, parts, size, *x.shape[2:]), 1, 0)

    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, parts * size)[:, :Q] * packed.mask_PQ  # noqa: E731
    logp, spread = jax.lax.map(jax.checkpoint(lambda part: head(*part)), tuple(map(split, args)))
    return join(logp), join(spread)


def _of_prompt(value_P: jax.Array, packed: Packed) -> jax.Array:
    """A value of each prompt at its answers' tokens, [P] -> [rows, Q]."""
    return jnp.take_along_axis(value_P.reshape(packed.tokens_PQ.shape[0], -1), packed.prompt_PQ, axis=1)
