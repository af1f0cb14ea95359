"""Attention, in the three shapes that this project needs. All of it is masked softmax in float32 over finite scores.

* `grouped_attention`: a row holds a prompt and, packed behind it, the answers of its group (DESIGN idea 1). An answer token
  sees the prompt and its own answer. Answers are at most `block` long, so a token's own answer lies in its own block of the
  packed part or in the one before: scores are [Q, T + 2 block], never [Q, Q].
* `lane_attention`: one new token per lane against the shared prompt cache and the lane's own answer cache.
* `segment_attention`: every token of a segment sees every other (image patches).

Scores against the prompt and against the answer are two products under one softmax: merging two attention calls through their
log-sum-exp would lose the gradient that flows through it (DESIGN section 6, traps).
"""

import jax
import jax.numpy as jnp
from flax import struct

MASKED = -1e30  # finite: a row that sees nothing stays finite


@struct.dataclass
class Row:
    """What grouped attention must know of its rows. `prompt` is T: slots [0, T) hold the prompt, the rest packed answers."""

    length_P: jax.Array  # valid prompt slots
    sample_PQ: jax.Array  # which answer a packed slot belongs to; -1 for none
    prompt: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)  # divides Q; no answer is longer


def _heads(q, kv_heads: int):
    """[..., H, C] -> [..., K, H / K, C]: query heads beside the key-value head that they share."""
    return q.reshape(*q.shape[:-2], kv_heads, -1, q.shape[-1])


def _softmax(scores: list[jax.Array], masks: list[jax.Array]) -> list[jax.Array]:
    """One softmax over the concatenated last axes of several score arrays; masked entries get exactly 0."""
    joined = jnp.concatenate([jnp.where(m, s, MASKED) for s, m in zip(scores, masks, strict=True)], axis=-1)
    top = jax.lax.stop_gradient(joined.max(axis=-1, keepdims=True))
    weight = jnp.where(joined > MASKED / 2, jnp.exp(joined - top), 0.0)
    weight = weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-30)
    cuts = [s.shape[-1] for s in scores[:-1]]
    return jnp.split(weight, [sum(cuts[: i + 1]) for i in range(len(cuts))], axis=-1)


def _scores(spec: str, q, k):
    return jnp.einsum(spec, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _prompt_attention(q, k, v, length_P, chunk: int):
    """Causal attention of the prompt to itself, in query chunks against the keys up to their end: [T, T] scores of a long
    prompt never exist at once, and what lies above the diagonal is not computed."""

    def one(q, k, v):
        seen = jnp.arange(k.shape[1]) <= (k.shape[1] - q.shape[1] + jnp.arange(q.shape[1]))[:, None]
        seen = seen & (jnp.arange(k.shape[1]) < length_P[:, None])[:, None, :]
        (weight,) = _softmax([_scores("ptkgc,pskc->pkgts", q, k)], [seen[:, None, None]])
        return jnp.einsum("pkgts,pskc->ptkgc", weight.astype(v.dtype), v)

    T = q.shape[1]
    if T <= chunk:
        return one(q, k, v)
    ends = [min(start + chunk, T) for start in range(0, T, chunk)]
    parts = [jax.checkpoint(one)(q[:, i * chunk : end], k[:, :end], v[:, :end]) for i, end in enumerate(ends)]
    return jnp.concatenate(parts, axis=1)


def _blocks(x, block: int):
    """[P, Q, ...] -> own block and the one before it, each [n, P, block, ...] (the first has no predecessor: zeros)."""
    own = jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // block, block, *x.shape[2:]), 1, 0)
    return own, jnp.concatenate([jnp.zeros_like(own[:1]), own[:-1]])


def _answer_attention(q, k, v, prompt_k, prompt_v, row: Row, chunk: int):
    """Packed answers against the prompt and against themselves, block by block."""
    P, Q = row.sample_PQ.shape
    sees_prompt = (jnp.arange(prompt_k.shape[1]) < row.length_P[:, None])[:, None, None, None, :]
    causal = jnp.arange(2 * row.block) <= row.block + jnp.arange(row.block)[:, None]

    def one(q_b, k_b, v_b, sample_b, sample_k):
        same = (sample_b[:, :, None] == sample_k[:, None, :]) & (sample_b >= 0)[:, :, None] & causal
        scores = [_scores("pbkgc,ptkc->pkgbt", q_b, prompt_k), _scores("pbkgc,pskc->pkgbs", q_b, k_b)]
        to_prompt, to_own = _softmax(scores, [sees_prompt, same[:, None, None]])
        out = jnp.einsum("pkgbt,ptkc->pbkgc", to_prompt.astype(v.dtype), prompt_v)
        return out + jnp.einsum("pkgbs,pskc->pbkgc", to_own.astype(v.dtype), v_b)

    def pair(x):
        own, before = _blocks(x, row.block)
        return jnp.concatenate([before, own], axis=2)

    # The block before the first holds zeros, whose sample must not be 0: shift by one around the pairing.
    args = (_blocks(q, row.block)[0], pair(k), pair(v), _blocks(row.sample_PQ, row.block)[0], pair(row.sample_PQ + 1) - 1)
    if Q <= chunk:
        out = jax.vmap(one)(*args)
    else:
        out = jax.lax.map(jax.checkpoint(lambda a: one(*a)), args)
    return jnp.moveaxis(out, 0, 1).reshape(P, Q, *q.shape[2:])


def grouped_attention(q, k, v, row: Row, chunk: int = 1024):
    """Row attention. q [P, T + Q, H, C], k and v [P, T + Q, K, C] -> [P, T + Q, H, C].

    Prompt slots at or past `length_P` are masked as keys for prompt and answers alike; their own outputs mean nothing.
    """
    shape, q, T = q.shape, _heads(q, k.shape[2]), row.prompt
    out = _prompt_attention(q[:, :T], k[:, :T], v[:, :T], row.length_P, chunk)
    if q.shape[1] > T:
        answers = _answer_attention(q[:, T:], k[:, T:], v[:, T:], k[:, :T], v[:, :T], row, chunk)
        out = jnp.concatenate([out, answers], axis=1)
    return out.reshape(shape)


def lane_attention(q, prompt_k, prompt_v, answer_k, answer_v, length_P, offset):
    """One token per lane at answer offset `offset` (its key already in the cache).

    q [P, G, H, C]; prompt_k, prompt_v [P, T, K, C]; answer_k, answer_v [P, G, R, K, C] -> [P, G, H, C].
    """
    shape, q = q.shape, _heads(q, prompt_k.shape[2])
    sees_prompt = (jnp.arange(prompt_k.shape[1]) < length_P[:, None])[:, None, None, None, :]
    sees_own = jnp.arange(answer_k.shape[2]) <= offset
    scores = [_scores("pgkjc,ptkc->pgkjt", q, prompt_k), _scores("pgkjc,pgrkc->pgkjr", q, answer_k)]
    to_prompt, to_own = _softmax(scores, [sees_prompt, sees_own])
    out = jnp.einsum("pgkjt,ptkc->pgkjc", to_prompt.astype(q.dtype), prompt_v)
    return (out + jnp.einsum("pgkjr,pgrkc->pgkjc", to_own.astype(q.dtype), answer_v)).reshape(shape)


def segment_attention(q, k, v, segment_BS):
    """Attention within equal segment numbers; -1 marks empty slots. q, k, v [B, S, H, C] -> [B, S, H, C]."""
    seen = (segment_BS[:, :, None] == segment_BS[:, None, :]) & (segment_BS >= 0)[:, None, :]
    (weight,) = _softmax([_scores("bqhc,bshc->bhqs", q, k)], [seen[:, None]])
    return jnp.einsum("bhqs,bshc->bqhc", weight.astype(v.dtype), v)
