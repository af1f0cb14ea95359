"""Grouped, lane and segment attention against dense attention under an explicit mask, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import QUICK

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


@functools.partial(jax.jit, static_argnames=("prompt", "chunk"), compiler_options=QUICK)
def grouped(q, k, v, length, sample, weight, prompt=T, chunk=1024):
    """Values, and the gradients of their weighted sum."""

    def loss(q, k, v):
        out = grouped_attention(q, k, v, Row(length, sample, prompt, BLOCK), chunk)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


@functools.partial(jax.jit, compiler_options=QUICK)
def reference(q, k, v, mask, weight):
    def loss(q, k, v):
        out = dense(q, k, v, mask)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


def random_rows(seed):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, BLOCK + 1, (P, 8))
    return rng.integers(0, T + 1, P).astype(np.int32), [lengths[np.cumsum(lengths) <= Q] for lengths in drawn]


@pytest.mark.parametrize("chunk", [1024, 4])
def test_grouped_equals_dense(chunk):
    for seed, (length, answers) in enumerate([(LENGTH, ANSWERS), *(random_rows(seed) for seed in range(5))]):
        q, k, v = make(seed)
        sample = packed_samples(answers, Q)
        real = real_slots(length, sample, T)
        weight = np.random.default_rng(seed + 99).normal(size=q.shape).astype(np.float32) * real[..., None, None]
        out, grads = grouped(q, k, v, length, sample, weight, chunk=chunk)
        expected, expected_grads = reference(q, k, v, row_mask(length, sample, T), weight)
        np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
        for name, ours, theirs in zip("qkv", grads, expected_grads, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
            assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize("chunk", [1024, 4])
def test_padding_changes_nothing(chunk):
    q, k, v = make(2)
    sample = packed_samples(ANSWERS, Q)
    real = real_slots(LENGTH, sample, T)
    weight = np.broadcast_to(real[..., None, None], q.shape).astype(np.float32)
    noise = iter(make(3, 4, BLOCK))
    none = np.zeros((P, 4 + BLOCK, H, C), np.float32)

    def pad(x, more):
        return np.concatenate([x[:, :T], more[:, :4], x[:, T:], more[:, 4:]], axis=1)

    def cut(x):
        return np.concatenate([x[:, :T], x[:, T + 4 : T + 4 + Q]], axis=1)

    out, grads = grouped(q, k, v, LENGTH, sample, weight, chunk=chunk)
    wide = [pad(x, next(noise) * 100) for x in (q, k, v)]  # whatever stands in padding
    wide_sample = np.pad(sample, ((0, 0), (0, BLOCK)), constant_values=-1)
    padded, padded_grads = grouped(*wide, LENGTH, wide_sample, pad(weight, none), prompt=T + 4, chunk=chunk)
    np.testing.assert_allclose(cut(padded)[real], np.asarray(out)[real], atol=1e-6)
    for ours, theirs in zip(padded_grads, grads, strict=True):
        np.testing.assert_allclose(cut(ours), theirs, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(ours)[:, [*range(T, T + 4), *range(-BLOCK, 0)]], 0)


@pytest.mark.parametrize("chunk", [1024, 4])
def test_rows_that_see_nothing_stay_finite(chunk):
    q, k, v = make(4)
    nothing = np.zeros(P, np.int32), np.full((P, Q), -1, np.int32)
    out, grads = grouped(q, k, v, *nothing, np.ones_like(q), chunk=chunk)  # weight on padding as well
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
    mask = row_mask(LENGTH, sample, T)
    expected, _ = reference(queries, flat(prompt_k, answer_k), flat(prompt_v, answer_v), mask, np.zeros_like(queries))
    expected = np.asarray(expected)[:, T:].reshape(P, G, R, H, C)
    step = jax.jit(lane_attention, compiler_options=QUICK)
    for offset in range(R):
        # The cache past the offset is not yet written: whatever stands there must not count.
        garbage = np.where(np.arange(R)[:, None, None] <= offset, 1, 1e4).astype(np.float32)
        out = step(q[:, :, offset], prompt_k, prompt_v, answer_k * garbage, answer_v * garbage, LENGTH, offset)
        np.testing.assert_allclose(out, expected[:, :, offset], atol=1e-5)


def test_segments_equal_dense():
    S = 12
    segment = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 12, [-1] * 12, [-1, 2, -1, 2, 1, 1, 0, -1, 0, 0, 2, 1]])
    rng = np.random.default_rng(6)
    q, k, v, weight = (rng.normal(size=(P, S, H, C)).astype(np.float32) for _ in range(4))
    real = segment >= 0
    weight *= real[..., None, None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def segments(q, k, v):
        def loss(q, k, v):
            out = segment_attention(q, k, v, segment)
            return jnp.sum(out * weight), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    out, grads = segments(q, k, v)
    expected, expected_grads = reference(q, k, v, (segment[:, :, None] == segment[:, None, :]) & real[:, None, :], weight)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    assert np.isfinite(out).all()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
