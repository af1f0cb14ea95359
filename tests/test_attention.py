"""Grouped, lane and segment attention against dense attention under an explicit mask, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models.attention import Row, grouped_attention, lane_attention, segment_attention

P, T, Q, BLOCK, H, K, C = 4, 8, 16, 8, 4, 2, 8
LENGTH = np.array([8, 5, 0, 1], np.int32)
ANSWERS = [[3, 0, 8, 2], [8, 8], [5, 1, 0, 7], []]  # lengths; the third row has no prompt, the last no answers


def dense(q, k, v, mask):
    """Plain attention; a query that may see nothing gets 0. q [P, S, H, C], k and v [P, S, K, C], mask [P, S, S]."""
    k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
    scores = jnp.einsum("pqhc,pshc->phqs", q, k) / np.sqrt(q.shape[-1])
    weight = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1, where=mask[:, None])
    return jnp.einsum("phqs,pshc->pqhc", jnp.where(mask.any(-1)[:, None, :, None], weight, 0.0), v)


def packed_samples(answers, Q):
    sample = np.full((len(answers), Q), -1, np.int32)
    for p, lengths in enumerate(answers):
        filled = np.repeat(np.arange(len(lengths)), lengths)
        sample[p, : len(filled)] = filled
    return sample


def row_mask(length, sample, T):
    """Which slot of [T prompt, Q answer] slots sees which, [P, S, S], written slot by slot."""
    P, S = len(length), T + sample.shape[1]
    mask = np.zeros((P, S, S), bool)
    for p in range(P):
        for i in range(S):
            for j in range(i + 1):
                prompt = j < T and j < length[p]
                own = i >= T and j >= T and sample[p, i - T] == sample[p, j - T] >= 0
                mask[p, i, j] = prompt or own
    return mask


def make(seed, T=T, Q=Q):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(P, T + Q, n, C)).astype(np.float32) for n in (H, K, K)]


def real_slots(length, sample, T):
    return np.concatenate([np.arange(T) < length[:, None], sample >= 0], axis=1)


@pytest.mark.parametrize("chunk", [1024, 4])
def test_grouped_equals_dense(chunk):
    q, k, v = make(0)
    sample = packed_samples(ANSWERS, Q)
    mask, real = row_mask(LENGTH, sample, T), real_slots(LENGTH, sample, T)
    weight = np.random.default_rng(1).normal(size=q.shape).astype(np.float32) * real[..., None, None]

    def ours(q, k, v):
        out = grouped_attention(q, k, v, Row(LENGTH, sample, T, BLOCK), chunk)
        return jnp.sum(out * weight), out

    def theirs(q, k, v):
        out = dense(q, k, v, mask)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(q, k, v)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(theirs, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    for name, ours_, theirs_ in zip("qkv", grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours_, theirs_, atol=1e-5, err_msg=name)
        assert np.abs(theirs_).max() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grouped_equals_dense_on_random_lengths(seed):
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(P):
        lengths = rng.integers(0, BLOCK + 1, 8)
        answers.append(lengths[np.cumsum(lengths) <= Q])
    length, sample = rng.integers(0, T + 1, P).astype(np.int32), packed_samples(answers, Q)
    q, k, v = make(seed)
    out = np.asarray(grouped_attention(q, k, v, Row(length, sample, T, BLOCK)))
    real = real_slots(length, sample, T)
    np.testing.assert_allclose(out[real], np.asarray(dense(q, k, v, row_mask(length, sample, T)))[real], atol=1e-5)


@pytest.mark.parametrize("chunk", [1024, 4])
def test_padding_changes_nothing(chunk):
    q, k, v = make(2)
    sample = packed_samples(ANSWERS, Q)
    real = real_slots(LENGTH, sample, T)
    out = np.asarray(grouped_attention(q, k, v, Row(LENGTH, sample, T, BLOCK), chunk))
    noise = iter(make(3, 4, BLOCK))

    def pad(x):
        more = next(noise) * 100  # whatever stands in padding
        return np.concatenate([x[:, :T], more[:, :4], x[:, T:], more[:, 4:]], axis=1)

    wide = np.pad(sample, ((0, 0), (0, BLOCK)), constant_values=-1)
    padded = np.asarray(grouped_attention(pad(q), pad(k), pad(v), Row(LENGTH, wide, T + 4, BLOCK), chunk))
    padded = np.concatenate([padded[:, :T], padded[:, T + 4 : T + 4 + Q]], axis=1)
    np.testing.assert_allclose(out[real], padded[real], atol=1e-6)


@pytest.mark.parametrize("chunk", [1024, 4])
def test_rows_that_see_nothing_stay_finite(chunk):
    q, k, v = make(4)
    row = Row(np.zeros(P, np.int32), np.full((P, Q), -1, np.int32), T, BLOCK)

    def loss(q, k, v):
        out = grouped_attention(q, k, v, row, chunk)
        return jnp.sum(out), out  # every slot, padding as well

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    for x in (out, *grads):
        np.testing.assert_array_equal(x, 0)


def test_lanes_equal_dense():
    G, R = 3, 5
    rng = np.random.default_rng(5)
    q = rng.normal(size=(P, G, R, H, C)).astype(np.float32)
    prompt_k, prompt_v = (rng.normal(size=(P, T, K, C)).astype(np.float32) for _ in range(2))
    answer_k, answer_v = (rng.normal(size=(P, G, R, K, C)).astype(np.float32) for _ in range(2))
    sample = np.broadcast_to(np.repeat(np.arange(G), R), (P, G * R))
    flat = lambda prompt, answer: np.concatenate([prompt, answer.reshape(P, G * R, -1, C)], axis=1)  # noqa: E731
    queries = flat(np.zeros((P, T, H, C), np.float32), q)
    expected = dense(queries, flat(prompt_k, answer_k), flat(prompt_v, answer_v), row_mask(LENGTH, sample, T))[:, T:]
    step = jax.jit(lane_attention)
    for offset in range(R):
        # The cache past the offset is not yet written: whatever stands there must not count.
        garbage = np.where(np.arange(R)[:, None, None] <= offset, 1, 1e4).astype(np.float32)
        out = step(q[:, :, offset], prompt_k, prompt_v, answer_k * garbage, answer_v * garbage, LENGTH, offset)
        np.testing.assert_allclose(out, np.asarray(expected).reshape(P, G, R, H, C)[:, :, offset], atol=1e-5)


def test_segments_equal_dense():
    S = 12
    segment = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12, [-1] * 12, [-1, 2, -1, 2, 1, 1, 0, -1, 0, 0, 2, 1]])
    rng = np.random.default_rng(6)
    q, k, v, weight = (rng.normal(size=(P, S, H, C)).astype(np.float32) for _ in range(4))
    real = segment >= 0
    mask = (segment[:, :, None] == segment[:, None, :]) & real[:, None, :]

    def loss(attend, *qkv):
        out = attend(*qkv)
        return jnp.sum(jnp.where(real[..., None, None], out * weight, 0.0)), out

    (_, out), grads = jax.value_and_grad(lambda *x: loss(lambda q, k, v: segment_attention(q, k, v, segment), *x), (0, 1, 2), True)(q, k, v)
    (_, expected), expected_grads = jax.value_and_grad(lambda *x: loss(lambda q, k, v: dense(q, k, v, mask), *x), (0, 1, 2), True)(q, k, v)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    assert np.isfinite(out).all()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
