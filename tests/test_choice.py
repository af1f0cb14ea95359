"""Which prompts a step trains on, and how they are dealt out to mini-batches and rows."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_recipe import G, programs, tiny_recipe

from pgjax.generate.decode import Rollout
from pgjax.grpo.programs import Judged
from pgjax.parallel.mesh import place_rows

P, MINI, MICRO = 32, 16, 8


@functools.cache
def run(mesh, shares: int = 8, oversample: int = 1):
    tiny = tiny_recipe()
    grpo = dataclasses.replace(tiny.grpo, prompts=P, mini_prompts=MINI, micro_prompts=MICRO, shares=shares)
    recipe = dataclasses.replace(tiny, grpo=grpo, rollout=dataclasses.replace(tiny.rollout, oversample=oversample))
    return programs(mesh, recipe, optax.sgd(1.0))


def lengths(prompts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, (prompts, G)).astype(np.int32)


def chosen(mesh, length_PG, informative_P=None, **options):
    """Numbers in the whole batch [rows, n], weights [P], and the fullest row's tokens."""
    program, shards = run(mesh, **options), mesh[0] * mesh[1]
    informative_P = np.ones(len(length_PG), bool) if informative_P is None else informative_P
    with jax.set_mesh(program.mesh):
        choice = jax.tree.map(np.asarray, program._choose(*place_rows((length_PG, informative_P), program.mesh)))
    shard_K = np.repeat(np.arange(shards), len(choice.index_K) // shards)
    index_K = choice.index_K + shard_K * (len(length_PG) // shards)
    return index_K.reshape(-1, MICRO // shards), choice.weight_K, int(choice.longest)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_every_prompt_once_and_the_same_mini_batches_on_every_mesh(mesh):
    length_PG = lengths(P)
    index, weight_K, longest = chosen(mesh, length_PG)
    assert sorted(index.ravel()) == list(range(P)) and (weight_K == 1).all()
    sums = length_PG.sum(1)[index].sum(1)
    assert longest == sums.max()
    minis = lambda index: [set(index[m :: P // MINI].ravel()) for m in range(P // MINI)]  # noqa: E731  (as split_rows takes them)
    assert minis(index) == minis(chosen((1, 1, 1), length_PG)[0])


def test_rows_are_alike():
    """Dealing out by length brings the fullest row near the mean; rows in the order of the batch are far from it."""
    length_PG = lengths(P, 3)
    index, _, longest = chosen((1, 1, 1), length_PG, shares=1)
    sums = length_PG.sum(1)
    assert longest == sums[index].sum(1).max() <= 1.03 * sums[index].sum(1).mean()
    assert sums.reshape(index.shape).sum(1).max() > 1.06 * sums[index].sum(1).mean()


def test_informative_groups_go_first():
    """Twice as many prompts are sampled: each share keeps its informative ones, and fills up with weight 0."""
    informative_P = np.random.default_rng(1).random(2 * P) < 0.4
    informative_P[:8] = True  # the first share has more than it can keep
    index, weight_K, _ = chosen((2, 2, 2), lengths(2 * P), informative_P, oversample=2)
    assert len(set(index.ravel())) == P
    np.testing.assert_array_equal(weight_K, informative_P[index.ravel()])
    for share in range(8):
        own = np.arange(8 * share, 8 * share + 8)
        kept = [p for p in own if p in index]
        wanted = sorted(own, key=lambda p: (not informative_P[p], p))[: P // 8]
        assert set(kept) == set(wanted)


def test_groups_without_a_spread_of_rewards_are_not_informative():
    program = run((1, 1, 1), oversample=2)
    reward_PG = jnp.zeros((2 * P, G)).at[5, 0].set(1.0)
    rollout = Rollout(None, None, None, jnp.asarray(lengths(2 * P)), None)
    judged = Judged(None, reward_PG, {}, None, None)
    choice, _ = program.choose(rollout, judged, SimpleNamespace(weight_P=jnp.ones(2 * P)))
    assert float(choice.weight_K.sum()) == 1.0 and int(choice.index_K[np.argmax(choice.weight_K)]) == 5
