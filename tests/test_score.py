"""Packing answers, and scoring them: what is packed, padded, repeated or chunked must not matter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qwen import QUICK
from tiny_recipe import G, P, R, batch, host_params, materials, setup

from pgjax.generate.law import Law
from pgjax.generate.score import Packed, balanced, pack, pack_values, packed_width, per_answer, score
from pgjax.tokenizer import never_sampled

MODEL = setup().model
LAW = Law(jnp.asarray(never_sampled(materials().tokenizer, MODEL.config.text.vocab)), materials().automaton, None, R, 0.7)


# --- packing ------------------------------------------------------------------------------------------------------------------

p, g, r = 3, 4, 5
lengths = st.lists(st.integers(0, r), min_size=p * g, max_size=p * g).map(lambda x: np.array(x, np.int32).reshape(p, g))


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 1))
def test_pack_round_trip(length_PG, wider):
    tokens_PGR = np.arange(1, 1 + p * g * r, dtype=np.int32).reshape(p, g, r)
    width = int(-(-length_PG.sum(1).max() // r) * r + wider * r) or r
    packed = jax.tree.map(np.asarray, pack(jnp.asarray(tokens_PGR), jnp.asarray(tokens_PGR + 1000), jnp.asarray(length_PG), width))
    for row in range(p):
        expected = [(t, n, o) for n in range(g) for o, t in enumerate(tokens_PGR[row, n, : length_PG[row, n]])]
        used = len(expected)
        got = list(zip(packed.tokens_PQ[row], packed.sample_PQ[row], packed.offset_PQ[row], strict=True))
        assert got[:used] == expected
        assert all(slot == (0, -1, 0) for slot in got[used:])
        assert (packed.state_PQ[row, :used] == packed.tokens_PQ[row, :used] + 1000).all() and (packed.state_PQ[row, used:] == 0).all()
    inside = np.arange(r) < length_PG[..., None]
    assert packed.group == g and packed.mask_PQ.sum() == inside.sum()
    value_PQ = np.asarray(pack_values(jnp.asarray(tokens_PGR, jnp.float32), packed))
    np.testing.assert_array_equal(value_PQ, packed.tokens_PQ)
    np.testing.assert_allclose(per_answer(value_PQ, packed, g), (tokens_PGR * inside).sum(-1))


@settings(max_examples=30, deadline=None)
@given(lengths, st.sampled_from([1, 3]))
def test_rows_of_several_prompts_are_those_of_one_joined(length_PG, prompts):
    """Answers are numbered through, and no slot is left between two prompts."""
    tokens_PGR = np.arange(1, 1 + p * g * r, dtype=np.int32).reshape(p, g, r)
    args = jnp.asarray(tokens_PGR), jnp.zeros((p, g, r), jnp.int32), jnp.asarray(length_PG)
    packed = jax.jit(pack, static_argnums=(3, 4))(*args, p * g * r, prompts)
    assert packed.tokens_PQ.shape == (p // prompts, p * g * r)
    inside = np.arange(r) < length_PG[..., None]
    for row, of in enumerate(np.split(np.arange(p), p // prompts)):
        used = inside[of].sum()
        np.testing.assert_array_equal(packed.tokens_PQ[row, :used], tokens_PGR[of][inside[of]])
        np.testing.assert_array_equal(packed.prompt_PQ[row, :used], np.repeat(np.arange(prompts), length_PG[of].sum(1)))
        assert (packed.sample_PQ[row, used:] == -1).all()
    value_PQ = pack_values(jnp.asarray(tokens_PGR, jnp.float32), packed)
    np.testing.assert_allclose(per_answer(value_PQ, packed, prompts * g).reshape(p, g), (tokens_PGR * inside).sum(-1))


@pytest.mark.parametrize(
    ("longest", "step", "width"),
    [(0, 0.0, 512), (512, 0.9, 512), (461, 0.9, 512), (456, 0.9, 456), (400, 0.9, 408), (1, 0.5, 8), (129, 0.5, 256), (1, 0.99, 8)],
)
def test_packed_width_is_the_smallest_of_the_series_that_holds_the_longest(longest, step, width):
    """Multiples of 8, at least 8."""
    assert packed_width(longest, 512, step) == width


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(1, 8), (2, 4), (4, 7), (3, 1)]), st.integers(0, 2**16))
def test_balanced_rows_hold_every_prompt_once_and_differ_little(shape, seed):
    prompts, rows = shape
    tokens_P = np.random.default_rng(seed).integers(0, 1000, prompts * rows)
    order_P = np.asarray(jax.jit(balanced, static_argnums=1)(jnp.asarray(tokens_P), prompts))
    assert sorted(order_P) == list(range(prompts * rows))
    sums = tokens_P[order_P].reshape(rows, prompts).sum(1)
    assert sums.max() - sums.min() <= np.ptp(tokens_P)  # what one prompt can differ from another


# --- scoring ------------------------------------------------------------------------------------------------------------------


def some_answers(seed: int = 0):
    """Random answers, some of one token and some empty."""
    rng = np.random.default_rng(seed)
    tokens_PGR = rng.integers(0, 1000, (P, G, R)).astype(np.int32)
    length_PG = rng.integers(1, R + 1, (P, G)).astype(np.int32)
    length_PG[0, 1], length_PG[1], length_PG[2, 0], length_PG[3] = 0, 0, 1, [R, R, R, R]
    return tokens_PGR, length_PG


def packed_answers(tokens_PGR, length_PG, width: int) -> Packed:
    return pack(jnp.asarray(tokens_PGR), jnp.zeros(tokens_PGR.shape, jnp.int32), jnp.asarray(length_PG), width)


run = jax.jit(functools.partial(score, MODEL), static_argnames=("chunk", "entropy"), compiler_options=QUICK)


@functools.partial(jax.jit, static_argnames="chunk")
def values_and_grads(params, prompts, packed, weight_PQ, chunk):
    """((weighted sum, (logprobs, entropies)), gradients)."""

    def weighted(params):
        logp_PQ, entropy_PQ = score(MODEL, params, prompts, packed, LAW, chunk=chunk)
        return jnp.sum(weight_PQ * (logp_PQ + 0.3 * entropy_PQ)), (logp_PQ, entropy_PQ)

    return jax.value_and_grad(weighted, has_aux=True)(params)


def close_trees(ours, theirs, tolerance: float = 1e-5):
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest), ours, theirs)


@functools.cache
def reference():
    """Values and gradients of the group, whole rows at a time."""
    packed = packed_answers(*some_answers(), G * R)
    weight_PQ = np.random.default_rng(5).normal(size=packed.tokens_PQ.shape).astype(np.float32)
    (_, values), grads = values_and_grads(host_params(), batch()[0], packed, weight_PQ, chunk=1024)
    return packed, weight_PQ, jax.tree.map(np.asarray, values), jax.tree.map(np.asarray, grads)


def test_empty_slots_are_zero():
    packed, _, (logp_PQ, entropy_PQ), grads = reference()
    empty = np.asarray(packed.sample_PQ) < 0
    assert empty.any() and (logp_PQ[empty] == 0).all() and (entropy_PQ[empty] == 0).all()
    assert (logp_PQ[~empty] < 0).all() and (entropy_PQ[~empty] > 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert np.abs(grads["visual"]["patch_embed"]["proj"]["kernel"]).max() > 0


def test_chunks_of_the_head_change_nothing():
    packed, weight_PQ, values, grads = reference()
    (_, chunked), chunked_grads = values_and_grads(host_params(), batch()[0], packed, weight_PQ, chunk=R)
    close_trees(chunked, values, 1e-6)
    close_trees(chunked_grads, grads)


def test_a_group_equals_its_answers_one_by_one():
    """Values and gradients with the prompt once are those with the prompt repeated for every answer."""
    packed, weight_PQ, (logp_PQ, entropy_PQ), grads = reference()
    tokens_PGR, length_PG = some_answers()
    alone = packed_answers(tokens_PGR.reshape(-1, 1, R), length_PG.reshape(-1, 1), R)
    used, sample, offset = (np.asarray(x) for x in (packed.sample_PQ >= 0, packed.sample_PQ, packed.offset_PQ))
    at = np.nonzero(used)[0] * G + sample[used], offset[used]
    weight_alone = np.zeros((P * G, R), np.float32)
    weight_alone[at] = weight_PQ[used]
    repeated = jax.tree.map(lambda x: np.repeat(x, G, axis=0), batch()[0])
    (_, values), alone_grads = values_and_grads(host_params(), repeated, alone, weight_alone, chunk=1024)
    np.testing.assert_allclose(np.asarray(values[0])[at], logp_PQ[used], atol=1e-5)
    np.testing.assert_allclose(np.asarray(values[1])[at], entropy_PQ[used], atol=1e-5)
    close_trees(alone_grads, grads)


def test_padding_changes_nothing():
    """More prompt slots and packed slots with anything in them, more empty patches: the same logprobs."""
    packed, _, (logp_PQ, entropy_PQ), _ = reference()
    prompts, more, rng = batch()[0], 8, np.random.default_rng(2)
    grow = lambda x, fill: np.concatenate([x, np.broadcast_to(fill, (P, more, *x.shape[2:])).astype(x.dtype)], axis=1)  # noqa: E731
    noise = rng.integers(0, 1000, (P, more))
    wide = dataclasses.replace(prompts, **{"tokens_PT": grow(prompts.tokens_PT, noise), "visual_PT": grow(prompts.visual_PT, 0)})
    wide = wide.replace(position_PTX=grow(prompts.position_PTX, 77))
    behind = np.arange(wide.tokens_PT.shape[1]) >= wide.length_P[:, None]
    wide = wide.replace(tokens_PT=np.where(behind, 5, wide.tokens_PT), position_PTX=np.where(behind[..., None], 9, wide.position_PTX))
    empty = wide.image_PI < 0
    wide = wide.replace(patches_PIB=np.where(empty[..., None], 3.0, wide.patches_PIB).astype(np.float32))
    junk = np.asarray(packed.sample_PQ) < 0
    filled = packed.replace(tokens_PQ=jnp.where(junk, 7, packed.tokens_PQ), state_PQ=jnp.where(junk, 3, packed.state_PQ))
    logp, entropy = run(host_params(), wide, filled, LAW)
    np.testing.assert_allclose(logp, logp_PQ, atol=1e-5)
    np.testing.assert_allclose(entropy, entropy_PQ, atol=1e-5)
    tokens_PGR, length_PG = some_answers()
    short_PG = np.minimum(length_PG, R // 2)  # fits half the slots: a smaller bucket
    small, large = (run(host_params(), prompts, packed_answers(tokens_PGR, short_PG, width), LAW)[0] for width in (G * R // 2, G * R))
    np.testing.assert_allclose(small, np.asarray(large)[:, : G * R // 2], atol=1e-5)
    assert (np.asarray(large)[:, G * R // 2 :] == 0).all()
