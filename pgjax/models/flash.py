"""Attention kernels (Pallas) for one device's tokens in one flat sequence, over listed pairs of blocks: Mosaic for TPU, Triton for GPU.

Both follow one scheme (FlashAttention, arXiv 2205.14135 and 2307.08691): a running softmax forward; backward the weights come anew
from the log-sum-exp, once by query blocks for the gradient of q, once by key blocks for those of k and v. Who sees whom, the softmax
step and the backward tile are plain functions of arrays, shared; the kernels differ in how blocks get to them. On a TPU the grid runs
over the pairs, whose numbers are prefetched; the query heads of a key-value head share its blocks and the mask, and tiles have the
keys first, so that what belongs to a query is a row. On a GPU one program owns one block and loops over its part of the list.

Axes: N tokens, H query heads, K key-value heads (query head h uses h // g), g = H / K, C of a head, M listed pairs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

MASKED = -1e30  # the score of a key that is not seen: finite, and far below UNSEEN
UNSEEN = MASKED / 2  # where the running maximum starts, and the log-sum-exp of a query that sees nothing: exp(MASKED - UNSEEN) is 0
VMEM = 48 << 20  # bytes of a TPU's fast memory that a call may take; the default of 16 MiB is too little for float32 or blocks of 1024


@struct.dataclass
class Pairs:
    """The pairs of blocks between which anything may be seen, and every diagonal pair (i, i), sorted by query block (for the
    gradients of k and v: by key block). Entries from `count` on repeat the last live pair."""

    q_M: jax.Array  # int32 [M], block of the queries
    k_M: jax.Array  # int32 [M], block of the keys
    count: jax.Array  # int32 []


def seen(query, key):
    """Whether queries see keys: both are (group, sample, order), int32 arrays that broadcast against each other."""
    (group_i, sample_i, order_i), (group_j, sample_j, order_j) = query, key
    return (group_i == group_j) & (group_i >= 0) & ((sample_j < 0) | (sample_j == sample_i)) & (order_j <= order_i)


def _dot(a, b, over: tuple[int, int]):
    """Matrix product over an axis of each, in the arrays' own type, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _scores(a, b, mask, scale: float):
    """Masked scores: [queries, keys] of q and k, or [keys, queries] of k and q."""
    return jnp.where(mask, _dot(a, b, (1, 1)) * scale, MASKED)


def _softmax_step(top, total, score, keys: int):
    """New running maximum and sum, the tile's weights, the factor on what was accumulated before. `keys` is the tile's axis of keys."""
    new = jnp.maximum(top, score.max(keys, keepdims=True))
    weight, fade = jnp.exp(score - new), jnp.exp(top - new)
    return new, fade * total + weight.sum(keys, keepdims=True), weight, fade


def _finish(acc, top, total):
    """Output and log-sum-exp; 0 and UNSEEN for a query that saw nothing."""
    total = jnp.maximum(total, 1e-30)
    return acc / total, top + jnp.log(total)


def _backward_tile(a, b, mask, lse, delta, scale: float):
    """The tile's weights, and the gradient of q . k. `a` and `b` are (q, do) and (k, v) for a tile [queries, keys], else swapped."""
    weight = jnp.exp(_scores(a[0], b[0], mask, scale) - lse)
    return weight, weight * (_dot(a[1], b[1], (1, 1)) - delta) * scale


# --- TPU: the kernels' refs are the prefetched lists, the blocks of one pair (leading axis g where query heads matter), accumulators ---


def _place(own_M, count):
    """Of the current pair: is it the first, is it the last of its own block, is it live?"""
    m, end = pl.program_id(1), pl.num_programs(1) - 1
    first = (m == 0) | (own_M[jnp.maximum(m - 1, 0)] != own_M[m])
    return first, (m == end) | (own_M[jnp.minimum(m + 1, end)] != own_M[m]), m < count[0]


def _tile_mask(ids_q, ids_k):
    """[keys, queries] of ids [3, queries] and [keys, 3]."""
    return seen([ids_q[i : i + 1, :] for i in range(3)], [ids_k[:, i : i + 1] for i in range(3)])


def _forward_kernel(q_M, k_M, count, ids_q, ids_k, q, k, v, o, lse, top, total, acc, *, scale):
    first, last, live = _place(q_M, count)

    @pl.when(first)
    def _():
        top[...] = jnp.full_like(top, UNSEEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(live)
    def _():
        mask = _tile_mask(ids_q, ids_k)
        for j in range(q.shape[0]):
            row, score = slice(j, j + 1), _scores(k[...], q[j], mask, scale)
            top[row], total[row], weight, fade = _softmax_step(top[row], total[row], score, 0)
            acc[j] = acc[j] * fade + _dot(v[...], weight.astype(v.dtype), (0, 0))

    @pl.when(last)
    def _():
        for j in range(q.shape[0]):
            row = slice(j, j + 1)
            out, lse[row] = _finish(acc[j], top[row], total[row])
            o[j] = out.astype(o.dtype)


def _backward_kernel(own_M, count, outs, sums, add, ids_q, ids_k, q, k, v, do, lse, delta, scale):
    """Of either gradient: `add(head, weight, d_score)` adds a tile to `sums`, which become `outs` at the end of an own block."""
    first, last, live = _place(own_M, count)

    @pl.when(first)
    def _():
        for x in sums:
            x[...] = jnp.zeros_like(x)

    @pl.when(live)
    def _():
        mask = _tile_mask(ids_q, ids_k)
        for j in range(q.shape[0]):
            row = slice(j, j + 1)
            add(j, *_backward_tile((k[...], v[...]), (q[j], do[j]), mask, lse[row], delta[row], scale))

    @pl.when(last)
    def _():
        for out, x in zip(outs, sums, strict=True):
            out[...] = x[...].astype(out.dtype)


def _dq_kernel(q_M, k_M, count, ids_q, ids_k, q, k, v, do, lse, delta, dq, acc, *, scale):
    def add(j, weight, d_score):
        acc[j] += _dot(k[...], d_score.astype(k.dtype), (0, 0))

    _backward_kernel(q_M, count, [dq], [acc], add, ids_q, ids_k, q, k, v, do, lse, delta, scale)


def _dkv_kernel(q_M, k_M, count, ids_q, ids_k, q, k, v, do, lse, delta, dk, dv, dk_acc, dv_acc, *, scale):
    def add(j, weight, d_score):
        dk_acc[...] += _dot(d_score.astype(q.dtype), q[j], (1, 0))
        dv_acc[...] += _dot(weight.astype(do.dtype), do[j], (1, 0))

    _backward_kernel(k_M, count, [dk, dv], [dk_acc, dv_acc], add, ids_q, ids_k, q, k, v, do, lse, delta, scale)


def _by_kv_head(x, K: int):
    """[N, H, C] -> [K, g, N, C]."""
    return jnp.moveaxis(x, 0, 1).reshape(K, -1, x.shape[0], x.shape[2])


def _flat(x):
    """[K, g, C, N] -> [N, H, C]."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 2, 0)


def _tpu_call(kernel, pairs: Pairs, q, k, v, ids, more, outs, sums, block: int, interpret: bool):
    """`more`, `outs` and `sums` (float32 accumulators) name their axes, with I for tokens as queries and J for tokens as keys."""
    (N, H, C), K = q.shape, k.shape[1]
    ins = [("3I", ids), ("J3", ids.T), ("KgIC", _by_kv_head(q, K)), ("KJC", jnp.moveaxis(k, 0, 1)), ("KJC", jnp.moveaxis(v, 0, 1)), *more]
    whole = {"K": K, "g": H // K, "C": C, "I": N, "J": N, "3": 3}
    tile = whole | {"K": None, "I": block, "J": block}

    def spec(axes):
        def place(h, m, q_M, k_M, count):
            at = {"K": h, "I": q_M[m], "J": k_M[m]}
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(tuple(tile[axis] for axis in axes), place)

    return pl.pallas_call(
        partial(kernel, scale=C**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(K, pairs.q_M.shape[0]),
            in_specs=[spec(axes) for axes, _ in ins],
            out_specs=[spec(axes) for axes, _ in outs],
            scratch_shapes=[pltpu.VMEM(tuple(tile[axis] for axis in axes), jnp.float32) for axes in sums],
        ),
        out_shape=[jax.ShapeDtypeStruct(tuple(whole[axis] for axis in axes), dtype) for axes, dtype in outs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(pairs.q_M, pairs.k_M, pairs.count.reshape(1), *(array for _, array in ins))


def forward_tpu(q, k, v, ids, pairs: Pairs, block: int, interpret: bool = False):
    """Attention on a TPU. q [N, H, C], k and v [N, K, C], ids int32 [3, N] -> output [N, H, C], log-sum-exp float32 [H, N].

    `pairs` is sorted by query block; `block` divides N and is a multiple of 128 (any size when interpreted).
    """
    outs = [("KgCI", q.dtype), ("KgI", jnp.float32)]
    o, lse = _tpu_call(_forward_kernel, pairs, q, k, v, ids, [], outs, ["gI", "gI", "gCI"], block, interpret)
    return _flat(o), lse.reshape(q.shape[1], -1)


def backward_tpu(q, k, v, ids, delta, lse, do, by_query: Pairs, by_key: Pairs, block: int, interpret: bool = False):
    """Gradients of q, k and v on a TPU. do [N, H, C]; delta float32 [H, N] is the sum over C of do * output; see `forward_tpu`."""
    kv_rows = (k.shape[1], -1, q.shape[0])
    more = [("KgIC", _by_kv_head(do, k.shape[1])), ("KgI", lse.reshape(kv_rows)), ("KgI", delta.reshape(kv_rows))]
    (dq,) = _tpu_call(_dq_kernel, by_query, q, k, v, ids, more, [("KgCI", q.dtype)], ["gCI"], block, interpret)
    outs = [("KJC", k.dtype), ("KJC", v.dtype)]
    dk, dv = _tpu_call(_dkv_kernel, by_key, q, k, v, ids, more, outs, ["JC", "JC"], block, interpret)
    return _flat(dq), jnp.moveaxis(dk, 0, 1), jnp.moveaxis(dv, 0, 1)


# --- GPU: the programs' refs are whole arrays, of which each loads what it needs; (block i, head h) is program (i, h) ---


def _ids(ids, at, axis: int):
    """(group, sample, order) of the tokens `at`, laid along an axis of a tile."""
    return [jnp.expand_dims(ids[i, at], 1 - axis) for i in range(3)]


def _forward_program(start, k_M, ids, q, k, v, o, lse, *, block, scale):
    i, h = pl.program_id(0), pl.program_id(1)
    own, u = pl.ds(i * block, block), jax.lax.div(h, q.shape[1] // k.shape[1])
    q_own, queries = q[own, h, :], _ids(ids, own, 0)

    def step(m, carry):
        acc, top, total = carry
        at = pl.ds(k_M[m] * block, block)
        score = _scores(q_own, k[at, u, :], seen(queries, _ids(ids, at, 1)), scale)
        top, total, weight, fade = _softmax_step(top, total, score, 1)
        return acc * fade + _dot(weight.astype(v.dtype), v[at, u, :], (1, 0)), top, total

    zero = jnp.zeros((block, 1), jnp.float32)
    nothing = jnp.zeros(q_own.shape, jnp.float32), jnp.full_like(zero, UNSEEN), zero
    out, log_sum = _finish(*jax.lax.fori_loop(start[i], start[i + 1], step, nothing))
    o[own, h, :] = out.astype(o.dtype)
    lse[h, own] = log_sum[:, 0]


def _dq_program(start, k_M, ids, q, k, v, do, lse, delta, dq, *, block, scale):
    i, h = pl.program_id(0), pl.program_id(1)
    own, u = pl.ds(i * block, block), jax.lax.div(h, q.shape[1] // k.shape[1])
    a, queries, lse_own, delta_own = (q[own, h, :], do[own, h, :]), _ids(ids, own, 0), lse[h, own][:, None], delta[h, own][:, None]

    def step(m, acc):
        at = pl.ds(k_M[m] * block, block)
        b = k[at, u, :], v[at, u, :]
        _, d_score = _backward_tile(a, b, seen(queries, _ids(ids, at, 1)), lse_own, delta_own, scale)
        return acc + _dot(d_score.astype(k.dtype), b[0], (1, 0))

    dq[own, h, :] = jax.lax.fori_loop(start[i], start[i + 1], step, jnp.zeros(a[0].shape, jnp.float32)).astype(dq.dtype)


def _dkv_program(start, q_M, ids, q, k, v, do, lse, delta, dk, dv, *, block, scale):
    i, u = pl.program_id(0), pl.program_id(1)
    own, g = pl.ds(i * block, block), q.shape[1] // k.shape[1]
    a, keys = (k[own, u, :], v[own, u, :]), _ids(ids, own, 0)

    def step(m, carry):  # over the pairs, and the query heads of each
        at, h = pl.ds(q_M[jax.lax.div(m, g)] * block, block), u * g + jax.lax.rem(m, g)
        b = q[at, h, :], do[at, h, :]
        weight, d_score = _backward_tile(a, b, seen(_ids(ids, at, 1), keys), lse[h, at][None], delta[h, at][None], scale)
        return carry[0] + _dot(d_score.astype(q.dtype), b[0], (1, 0)), carry[1] + _dot(weight.astype(do.dtype), b[1], (1, 0))

    zero = jnp.zeros(a[0].shape, jnp.float32)
    d_key, d_value = jax.lax.fori_loop(start[i] * g, start[i + 1] * g, step, (zero, zero))
    dk[own, u, :] = d_key.astype(dk.dtype)
    dv[own, u, :] = d_value.astype(dv.dtype)


def _gpu_call(program, own_M, other_M, count, ids, arrays, outs, heads: int, block: int, interpret: bool):
    """Pads C to a power of two for the programs. `own_M` is sorted: [start[i], start[i + 1]) of the list is block i's part."""
    blocks, C = ids.shape[1] // block, arrays[0].shape[-1]
    start = jnp.minimum(jnp.searchsorted(own_M, jnp.arange(blocks + 1)), count).astype(jnp.int32)
    wide = pl.next_power_of_2(C)
    arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, wide - C))) if x.ndim == 3 else x for x in arrays]
    results = pl.pallas_call(
        partial(program, block=block, scale=C**-0.5),
        grid=(blocks, heads),
        out_shape=[jax.ShapeDtypeStruct((*x.shape[:2], wide) if len(x.shape) == 3 else x.shape, x.dtype) for x in outs],
        compiler_params=plgpu.CompilerParams(num_warps=4 if wide <= 64 else 8, num_stages=2),
        interpret=interpret,
        name=program.__name__.strip("_"),
    )(start, other_M, ids, *arrays)
    return [x[..., :C] if x.ndim == 3 else x for x in results]


def forward_gpu(q, k, v, ids, pairs: Pairs, block: int, interpret: bool = False):
    """As `forward_tpu`, on a GPU. `block` divides N and is a power of two, at least 16; 64 suits."""
    outs = [q, jax.ShapeDtypeStruct(q.shape[1::-1], jnp.float32)]
    return tuple(_gpu_call(_forward_program, pairs.q_M, pairs.k_M, pairs.count, ids, [q, k, v], outs, q.shape[1], block, interpret))


def backward_gpu(q, k, v, ids, delta, lse, do, by_query: Pairs, by_key: Pairs, block: int, interpret: bool = False):
    """As `backward_tpu`, on a GPU."""
    arrays = [q, k, v, do, lse, delta]
    (dq,) = _gpu_call(_dq_program, by_query.q_M, by_query.k_M, by_query.count, ids, arrays, [q], q.shape[1], block, interpret)
    dk, dv = _gpu_call(_dkv_program, by_key.k_M, by_key.q_M, by_key.count, ids, arrays, [k, v], k.shape[1], block, interpret)
    return dq, dk, dv
