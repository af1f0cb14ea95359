"""Attention, whole and by lanes, against dense attention under an explicit mask: values, and gradients of q, k and v."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import QUICK

from pgjax.config import MeshConfig
from pgjax.models.attention import Segments, attention, lane_attention, live_blocks
from pgjax.parallel.mesh import make_mesh, place_rows

H, K, C = 4, 2, 8


def dense(q, k, v, mask):
    """Plain attention; a query that may see nothing gets 0. q [B, S, H, C], k and v [B, S, K, C], mask [B, S, S]."""
    k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
    scores = jnp.einsum("bqhc,bshc->bhqs", q, k) / np.sqrt(q.shape[-1])
    weight = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1, where=mask[:, None])
    return jnp.einsum("bhqs,bshc->bqhc", jnp.where(mask.any(-1)[:, None, :, None], weight, 0.0), v)


def row(rng, S: int, longest: int) -> np.ndarray:
    """Ids [3, S] as rows have them: padded prompts, then their answers back to back, then empty slots."""
    prompts = rng.integers(1, 4)
    slots = S // (2 * prompts)
    lengths = rng.integers(0, slots + 1, prompts)
    ids = [(p if t < lengths[p] else -1, -1, t) for p in range(prompts) for t in range(slots)]
    sample = 0
    for p in range(prompts):
        for length in rng.integers(0, longest, 3):
            ids += [(p, sample, slots + t) for t in range(length)]
            sample += 1
    return np.array((ids + [(-1, -1, 0)] * S)[:S], np.int32).T


def picture(rng, S: int) -> np.ndarray:
    """Ids [3, S] of patches: pictures or windows with empty slots at any place."""
    group = np.repeat(np.arange(S), rng.integers(1, S // 2, S))[:S]
    return np.stack([np.where(rng.random(S) < 0.1, -1, group), np.full(S, -1), np.zeros(S)]).astype(np.int32)


def mask_of(ids):
    """Who sees whom, [B, S, S], from the words of `Segments`; ids [B, 3, S]."""
    group, sample, order = np.moveaxis(ids, 1, 0)
    own = (group[:, :, None] == group[:, None]) & (group >= 0)[:, None]
    return own & ((sample[:, None] == -1) | (sample[:, None] == sample[:, :, None])) & (order[:, None] <= order[:, :, None])


def layouts(S: int) -> np.ndarray:
    rng = np.random.default_rng(S)
    return np.stack([row(rng, S, S // 4), row(rng, S, 5), picture(rng, S), np.full((3, S), -1)])


def values(seed: int, S: int, kv_heads: int = K):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(4, S, n, C)).astype(np.float32) for n in (H, kv_heads, kv_heads, H)]


def with_gradients(f):
    """(out, gradients of q, k and v of the weighted sum) of a function of q, k and v."""

    def run(q, k, v, weight, *more):
        loss = lambda *qkv: (lambda out: (jnp.sum(out * weight), out))(f(*qkv, *more))  # noqa: E731
        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return run


ours = jax.jit(with_gradients(lambda q, k, v, ids: attention(q, k, v, Segments(*jnp.moveaxis(ids, 1, 0)))))
theirs = jax.jit(with_gradients(dense), compiler_options=QUICK)


@pytest.mark.parametrize("S", [24, 130, 300])
def test_attention_equals_dense(S):
    """One block, one more slot than a block has, several blocks; rows of prompts with answers, pictures, and one with nothing."""
    ids, (q, k, v, weight) = layouts(S), values(S, S)
    got = ours(q, k, v, weight, ids)
    for name, x, y in zip(("out", "q", "k", "v"), got, theirs(q, k, v, weight, mask_of(ids)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)
        assert np.abs(np.asarray(y)[:3]).max() > 0.1 and not np.asarray(x)[3].any()


def test_what_stands_in_empty_slots_does_not_matter():
    S = 130
    ids, (q, k, v, weight) = layouts(S), values(1, S)
    empty = (ids[:, 0] < 0)[..., None, None]
    got, other = (ours(*(np.where(empty, x * scale, x).astype(np.float32) for x in (q, k, v)), weight, ids) for scale in (1, 1e4))
    for x, y in zip(got, other, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("mesh", "kv_heads"), [((2, 2, 2), 2), ((1, 2, 4), 2), ((4, 1, 2), 1)])
def test_devices_share_rows_and_heads(mesh, kv_heads):
    """Also where there are fewer key-value heads than devices to split them over."""
    mesh = make_mesh(MeshConfig(*mesh))
    ids, (q, k, v, weight) = layouts(130), values(7, 130, kv_heads)
    with jax.set_mesh(mesh):
        got = ours(*place_rows((q, k, v, weight, ids), mesh))
    for x, y in zip(got, theirs(q, k, v, weight, mask_of(ids)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_blocks_that_see_nothing_are_not_visited():
    """Live pairs are those with anything to see, up to what the smallest and largest ids in a block can tell; whole ones see all."""
    for S, block in ((128, 16), (300, 20), (240, 8)):
        ids = layouts(S)
        live, whole = (np.asarray(x) for x in live_blocks(jnp.moveaxis(ids, 1, 0), block))
        tiles = mask_of(ids).reshape(4, S // block, block, S // block, block)
        any_seen, all_seen = tiles.any((2, 4)), tiles.all((2, 4))
        assert (live >= any_seen).all() and (whole <= all_seen).all()
        assert live[:2].sum() <= 1.5 * any_seen[:2].sum() and (whole == all_seen)[:3].mean() > 0.9


def test_lanes_equal_dense():
    """Rings that start anywhere: of the answer's slots those are read that the lane has written."""
    P, T, G, R = 4, 8, 3, 5
    rng = np.random.default_rng(5)
    length = np.array([8, 5, 0, 1], np.int32)
    q = rng.normal(size=(P, G, R, H, C)).astype(np.float32)
    prompt_k, prompt_v = (rng.normal(size=(P, T, K, C)).astype(np.float32) for _ in range(2))
    answer_k, answer_v = (rng.normal(size=(P, G, R, K, C)).astype(np.float32) for _ in range(2))
    flat = lambda prompt, answer: np.concatenate([prompt, answer.reshape(P, G * R, -1, C)], axis=1)  # noqa: E731
    queries = flat(np.zeros((P, T, H, C), np.float32), q)
    order = np.concatenate([np.arange(T), np.tile(T + np.arange(R), G)])
    sample = np.concatenate([np.full(T, -1), np.repeat(np.arange(G), R)])
    group = np.where((np.arange(T + G * R) < length[:, None]) | (sample >= 0), 0, -1)
    ids = np.stack([group, *(np.broadcast_to(x, group.shape) for x in (sample, order))], axis=1)
    expected = theirs(queries, flat(prompt_k, answer_k), flat(prompt_v, answer_v), np.zeros_like(queries), mask_of(ids))[0]
    expected = np.asarray(expected)[:, T:].reshape(P, G, R, H, C)
    step = jax.jit(lane_attention, compiler_options=QUICK)
    turned = [np.roll(x, 2, axis=2) for x in (answer_k, answer_v)]  # token o in slot (o + 2) % R
    by_head = [x.swapaxes(1, 2) for x in (prompt_k, prompt_v)]
    for offset in range(R):
        written = np.roll(np.arange(R) <= offset, 2)
        garbage = [np.where(written[:, None, None], x, 1e4).astype(np.float32).transpose(0, 3, 1, 2, 4) for x in turned]
        garbage[0] = garbage[0].swapaxes(3, 4)
        sees_own = np.broadcast_to(written, (P, G, R))
        out = step(q[:, :, offset], *by_head, *garbage, (np.arange(T) < length[:, None])[:, None], sees_own)
        np.testing.assert_allclose(out, expected[:, :, offset], atol=1e-5)
