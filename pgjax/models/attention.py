"""Attention. Whatever is attended to, prompts with packed answers or patches of pictures, is tokens under one rule of who sees whom.

`attention` works on pairs of a query block and a key block, and only on those of which a part may be seen: scores exist for one
pair at a time, work grows with what is seen, and a row may hold several prompts. It has one VJP, from the saved log-sum-exp, and
three backends, by the platform of the mesh: Pallas kernels on TPU and GPU (models/flash.py), the loops below elsewhere. Merging a
call for the prompt with one for the answer instead would lose the gradient through the log-sum-exp (DESIGN section 6, traps).

`lane_attention` is decoding: one new token per lane against a prompt's cache and the lane's own. `cached_attention` is scoring: many new
tokens of a row against keys of which each sees its own choice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from pgjax.models import flash
from pgjax.models.flash import MASKED, UNSEEN, Pairs, seen
from pgjax.parallel.mesh import TRAINING, spec

EMPTY = -1  # group of an empty slot; sample of a token that all of its group may see
FLOAT32 = {"preferred_element_type": jnp.float32}


@struct.dataclass
class Segments:
    """A token sees those of its own group that come no later and belong to its own sample or to none. int32 [B, S] each."""

    group: jax.Array  # below S: which prompt of the row, picture or window; -1: an empty slot
    sample: jax.Array  # which answer of the row; -1: prompt or patch
    order: jax.Array  # position; 0 throughout where everybody sees everybody

    @classmethod
    def prompts(cls, length_P: jax.Array, T: int) -> "Segments":
        """Rows of one right-padded prompt."""
        order = jnp.broadcast_to(jnp.arange(T), (length_P.shape[0], T))
        return cls(jnp.where(order < length_P[:, None], 0, EMPTY), jnp.full_like(order, EMPTY), order)

    @classmethod
    def pictures(cls, number_PI: jax.Array) -> "Segments":
        """Patches that see all of the same number."""
        return cls(number_PI, jnp.full_like(number_PI, EMPTY), jnp.zeros_like(number_PI))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments) -> jax.Array:
    """q [B, S, H, C], k and v [B, S, K, C], H a multiple of K -> [B, S, H, C]; softmax in float32. What sees nothing gets 0.

    On a mesh every device works on its own rows and heads.
    """
    ids = jnp.stack([segments.group, segments.sample, segments.order])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(q, k, v, ids, jax.default_backend())
    if k.shape[2] % mesh.shape["tensor"] and not q.shape[2] % mesh.shape["tensor"]:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))  # every device holds the keys of its own queries
    place = lambda x, *names: spec(names, x.shape, TRAINING, mesh)  # noqa: E731
    heads = [place(x, "batch", None, axis, None) for x, axis in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))]
    specs = dict(in_specs=(*heads, place(ids, None, "batch", None)), out_specs=heads[0])
    return jax.shard_map(partial(attend, platform=mesh.abstract_device.platform), mesh=mesh, check_vma=False, **specs)(q, k, v, ids)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q, k, v, ids, platform: str):
    """`attention` on one device of a platform, as JAX names it; ids int32 [3, B, S]."""
    return _forward(q, k, v, ids, platform)[0]


def _forward(q, k, v, ids, platform: str):
    found = _kernel_forward(platform, q, k, v, ids) if platform in BLOCK else _loop_forward(q, k, v, ids)
    out, lse_BSH = (checkpoint_name(x, "attention") for x in found)
    return out, (q, k, v, ids, out, lse_BSH)


def _backward(platform: str, saved, d_out):
    q, k, v, ids, out, lse_BSH = saved
    args = q, k, v, ids, jnp.einsum("bshc,bshc->bsh", out, d_out, **FLOAT32), lse_BSH, d_out
    return *(_kernel_backward(platform, *args) if platform in BLOCK else _loop_backward(*args)), None


attend.defvjp(_forward, _backward)


# --- pairs of blocks ------------------------------------------------------------------------------------------------------------


def _blocks(S: int, most: int, multiple: int) -> int:
    """Size of blocks of at most `most` slots, multiples of `multiple`, that S slots fill with little left over."""
    return -(-S // (multiple * -(-S // most))) * multiple


def _fill(block: int, *arrays, axis: int = 1, value=0):
    """Arrays with slots added up to whole blocks."""
    for x in arrays:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, -x.shape[axis] % block)
        yield jnp.pad(x, pads, constant_values=value)


def live_blocks(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Which key blocks a query block of the same row may see something of, judged by the smallest and largest ids in them, and those
    of which every query sees every key: bool [B, n, n]. ids int32 [3, B, n * block]."""
    group, sample, order = ids.reshape(*ids.shape[:2], -1, block)
    valid, far = group >= 0, jnp.iinfo(jnp.int32).max
    low = [jnp.where(valid, x, far).min(-1) for x in (group, sample, order)]
    high = [jnp.where(valid, x, -far).max(-1) for x in (group, sample, order)]
    meets = lambda x: (low[x][:, :, None] <= high[x][:, None]) & (low[x][:, None] <= high[x][:, :, None])  # noqa: E731
    same = lambda x: (low[x] == high[x])[:, :, None] & (low[x][:, :, None] == low[x][:, None]) & (low[x] == high[x])[:, None]  # noqa: E731
    shared = (low[1] < 0)[:, None]  # the key block has tokens that all of their group see
    live = meets(0) & (shared | meets(1)) & (low[2][:, None] <= high[2][:, :, None])
    full = valid.all(-1)
    whole = same(0) & full[:, :, None] & full[:, None] & ((high[1] < 0)[:, None] | same(1)) & (high[2][:, None] <= low[2][:, :, None])
    return live, whole


def _pairs(live: jax.Array) -> Pairs:
    """Pairs by query block, blocks numbered over all rows; after the last it is repeated. M = B n^2."""
    B, n, _ = live.shape
    b, i, j = jnp.nonzero(live, size=live.size)
    count = live.sum()
    last = lambda x: jnp.where(jnp.arange(live.size) < count, x, x[count - 1]).astype(jnp.int32)  # noqa: E731
    return Pairs(last(b * n + i), last(b * n + j), count)


# --- kernels: all rows as one sequence ------------------------------------------------------------------------------------------

BLOCK = {"tpu": (512, 128), "gpu": (64, 64)}  # most slots of a block, and what they are a multiple of


def _one_sequence(platform: str, ids, *arrays):
    """Filled up, rows joined: block size, ids [3, N], arrays [N, ...], and pairs by query and by key block, all diagonal ones too."""
    block = _blocks(ids.shape[2], *BLOCK[platform])
    (ids,) = _fill(block, ids, axis=2, value=EMPTY)
    live = live_blocks(ids, block)[0] | jnp.eye(ids.shape[2] // block, dtype=bool)
    by_query, by_key = _pairs(live), _pairs(live.swapaxes(1, 2))
    by_key = by_key.replace(q_M=by_key.k_M, k_M=by_key.q_M)
    return block, ids.reshape(3, -1), [x.reshape(-1, *x.shape[2:]) for x in _fill(block, *arrays)], by_query, by_key


def _rows_again(x, like):
    """[N, ...] -> [B, S, ...] without what was filled up."""
    return x.reshape(like.shape[0], -1, *x.shape[1:])[:, : like.shape[1]]


def _kernel_forward(platform: str, q, k, v, ids):
    block, ids, arrays, by_query, _ = _one_sequence(platform, ids, q, k, v)
    out, lse = getattr(flash, f"forward_{platform}")(*arrays, ids, by_query, block)
    return _rows_again(out, q), _rows_again(lse.T, q)


def _kernel_backward(platform: str, q, k, v, ids, delta, lse, d_out):
    block, ids, (*qkv, delta, lse, d_out), *pairs = _one_sequence(platform, ids, q, k, v, delta, lse, d_out)
    grads = getattr(flash, f"backward_{platform}")(*qkv, ids, delta.T, lse.T, d_out, *pairs, block)
    return tuple(_rows_again(grad, like) for grad, like in zip(grads, (q, k, v), strict=True))


# --- loops over pairs: any device -----------------------------------------------------------------------------------------------

LOOP_BLOCK = (64, 8)  # most slots of a block, and what they are a multiple of: tiles stay in a core's cache


def _at(x, index):
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _add(x, value, index):
    return jax.lax.dynamic_update_index_in_dim(x, _at(x, index) + value, index, 0)


# Queries lie as [blocks, K, C, group * block] and keys as [blocks, K, block, C], so that scores are [K, keys, queries]: XLA on CPUs
# reduces fast over an axis that is not the last. What is done to single scores has the group's axis apart: the mask, which lacks it,
# would otherwise have to be indexed by remainders, and keep exp from being vectorized.


def _cut_q(x, block: int, K: int):
    B, S, H, C = x.shape
    return x.reshape(B * S // block, block, K, H // K, C).transpose(0, 2, 4, 3, 1).reshape(-1, K, C, H // K * block)


def _join_q(x, block: int, like):
    """[blocks, K, C, group * block] -> [B, S, H, C] as `like`."""
    B, S, H = like.shape[:3]
    x = x.reshape(x.shape[0], x.shape[1], x.shape[2], -1, block).transpose(0, 4, 1, 3, 2)
    return x.reshape(B, -1, H, x.shape[-1])[:, :S].astype(like.dtype)


def _together(x):
    """[..., group, block] -> [..., group * block]"""
    return x.reshape(*x.shape[:-2], -1)


def _cut_k(x, block: int):
    return x.reshape(-1, block, *x.shape[2:]).swapaxes(1, 2)


def _join_k(x, like):
    return x.swapaxes(1, 2).reshape(like.shape[0], -1, *like.shape[2:])[:, : like.shape[1]].astype(like.dtype)


@struct.dataclass
class _Loop:
    """What the loops over pairs read: blocks of q, k, v and ids [blocks, 3, block]; `whole_M` marks pairs without a mask."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    ids: jax.Array
    pairs: Pairs
    whole_M: jax.Array

    @classmethod
    def over(cls, q, k, v, ids, block: int) -> "_Loop":
        (ids,) = _fill(block, ids, axis=2, value=EMPTY)
        live, whole = live_blocks(ids, block)
        pairs = _pairs(live)
        n = live.shape[1]
        whole_M = whole[pairs.q_M // n, pairs.q_M % n, pairs.k_M % n]
        q, k, v = _fill(block, q, k, v)
        ids = jnp.moveaxis(ids.reshape(3, -1, block), 1, 0)
        return cls(_cut_q(q, block, k.shape[2]), _cut_k(k, block), _cut_k(v, block), ids, pairs, whole_M)

    def scores(self, m):
        """Masked scores [K, keys, group, queries] of pair number m."""
        i, j = self.pairs.q_M[m], self.pairs.k_M[m]
        score = jnp.einsum("ksc,kcq->ksq", _at(self.k, j), _at(self.q, i), **FLOAT32) * self.k.shape[-1] ** -0.5
        mask = lambda query, key: jnp.where(seen(query[:, None], key[:, :, None]), 0.0, MASKED)  # noqa: E731
        none = lambda query, key: jnp.zeros((key.shape[1], query.shape[1]))  # noqa: E731
        # A branch of its own keeps XLA from working the mask out anew for every head and use.
        mask = jax.lax.cond(self.whole_M[m], none, mask, _at(self.ids, i), _at(self.ids, j))
        return score.reshape(*score.shape[:2], -1, mask.shape[1]) + mask[:, None]


def _loop_forward(q, k, v, ids):
    block = _blocks(q.shape[1], *LOOP_BLOCK)
    loop = _Loop.over(q, k, v, ids, block)
    pairs = loop.pairs

    def visit(m, carry):
        out, top, total = carry
        i, score = pairs.q_M[m], loop.scores(m)
        before = _at(top, i)
        now = jnp.maximum(before, score.max(axis=1))
        weight, shrink = jnp.exp(score - now[:, None]), jnp.exp(before - now)
        value = jnp.einsum("ksc,ksq->kcq", _at(loop.v, pairs.k_M[m]), _together(weight).astype(v.dtype), **FLOAT32)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0)  # noqa: E731
        out = put(out, _at(out, i) * _together(shrink)[:, None] + value)
        return out, put(top, now), put(total, _at(total, i) * shrink + weight.sum(axis=1))

    zeros = jnp.zeros((*loop.q.shape[:2], loop.q.shape[3] // block, block))
    out, top, total = jax.lax.fori_loop(0, pairs.count, visit, (jnp.zeros(loop.q.shape), zeros + UNSEEN, zeros))
    top, total = _together(top), _together(jnp.maximum(total, 1e-30))
    lse = _join_q((top + jnp.log(total))[:, :, None], block, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    return _join_q(out / total[:, :, None], block, q), lse[..., 0]


def _loop_backward(q, k, v, ids, delta, lse, d_out):
    block, K = _blocks(q.shape[1], *LOOP_BLOCK), k.shape[2]
    loop = _Loop.over(q, k, v, ids, block)
    pairs, scale = loop.pairs, q.shape[-1] ** -0.5
    d_out, delta, lse = (_cut_q(x, block, K) for x in _fill(block, d_out, delta[..., None], lse[..., None]))
    delta, lse = (x.reshape(*x.shape[:3], -1, block) for x in (delta, lse))

    def visit(m, carry):
        d_q, d_k, d_v = carry
        i, j = pairs.q_M[m], pairs.k_M[m]
        q_i, d_i = _at(loop.q, i), _at(d_out, i)
        weight = jnp.exp(loop.scores(m) - _at(lse, i))
        d_weight = jnp.einsum("ksc,kcq->ksq", _at(loop.v, j), d_i, **FLOAT32)
        d_score = _together(weight * (d_weight.reshape(weight.shape) - _at(delta, i)) * scale).astype(q.dtype)
        weight = _together(weight)
        d_q = _add(d_q, jnp.einsum("ksc,ksq->kcq", _at(loop.k, j), d_score, **FLOAT32), i)
        d_k = _add(d_k, jnp.einsum("ksq,kcq->ksc", d_score, q_i, **FLOAT32), j)
        d_v = _add(d_v, jnp.einsum("ksq,kcq->ksc", weight.astype(v.dtype), d_i, **FLOAT32), j)
        return d_q, d_k, d_v

    d_q, d_k, d_v = jax.lax.fori_loop(0, pairs.count, visit, tuple(jnp.zeros(x.shape) for x in (loop.q, loop.k, loop.v)))
    return _join_q(d_q, block, q), _join_k(d_k, k), _join_k(d_v, v)


# --- decoding -------------------------------------------------------------------------------------------------------------------


def lane_attention(q, prompt_k, prompt_v, answer_k, answer_v, sees_prompt_PGT, sees_own_PGR):
    """One token per lane against its prompt's cache, read once for all lanes of a row, and its own, under one softmax.

    q [P, G, H, C]; prompt_k, prompt_v [P, K, T, C]; answer_k [P, K, G, C, R], answer_v [P, K, G, R, C] -> [P, G, H, C]. The masks are
    bool; that of the prompt may be one for all lanes, G = 1.
    """
    shape = q.shape
    q = jnp.moveaxis(q.reshape(*q.shape[:2], prompt_k.shape[1], -1, q.shape[-1]), 2, 1)  # by head, as the caches lie
    to_prompt = jnp.einsum("pkgjc,pktc->pkgjt", q, prompt_k, **FLOAT32) * q.shape[-1] ** -0.5
    to_own = jnp.einsum("pkgjc,pkgcr->pkgjr", q, answer_k, **FLOAT32) * q.shape[-1] ** -0.5
    masked = jnp.where(sees_prompt_PGT[:, None, :, None], to_prompt, MASKED), jnp.where(sees_own_PGR[:, None, :, None], to_own, MASKED)
    top = jnp.maximum(masked[0].max(-1, keepdims=True), masked[1].max(-1, keepdims=True))
    to_prompt, to_own = (jnp.where(s > MASKED / 2, jnp.exp(s - top), 0.0) for s in masked)
    total = to_prompt.sum(-1, keepdims=True) + to_own.sum(-1, keepdims=True)
    out = jnp.einsum("pkgjt,pktc->pkgjc", to_prompt.astype(q.dtype), prompt_v, **FLOAT32)
    out = out + jnp.einsum("pkgjr,pkgrc->pkgjc", to_own.astype(q.dtype), answer_v, **FLOAT32)
    return jnp.moveaxis(out / jnp.maximum(total, 1e-30), 1, 2).astype(q.dtype).reshape(shape)


def cached_attention(q, k, v, sees_PQS):
    """q [P, Q, H, C]; k, v [P, K, S, C], as caches lie; sees bool [P, Q, S] -> [P, Q, H, C]. For few tokens: scores exist whole."""
    shape = q.shape
    q = jnp.moveaxis(q.reshape(*shape[:2], k.shape[1], -1, shape[-1]), 2, 1)
    score = jnp.einsum("pkqjc,pksc->pkqjs", q, k, **FLOAT32) * shape[-1] ** -0.5
    weight = jax.nn.softmax(jnp.where(sees_PQS[:, None, :, None], score, MASKED), axis=-1)
    out = jnp.einsum("pkqjs,pksc->pkqjc", weight.astype(q.dtype), v, **FLOAT32)
    return jnp.moveaxis(out, 1, 2).astype(q.dtype).reshape(shape)
