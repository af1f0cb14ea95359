"""The update: sums and counts make micro-batches and meshes agree, rows of weight zero count nowhere, the first ratio is 1."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_recipe import MESHES, ONE, G, P, R, batch, given_experience, params, programs, setup, tiny_recipe

from pgjax.config import LossConfig, OptimizerConfig
from pgjax.generate.decode import Rollout
from pgjax.generate.lanes import Slots
from pgjax.generate.score import pack_values
from pgjax.grpo.programs import Experience, Judged
from pgjax.parallel.mesh import place_rows
from pgjax.train.update import Skips, TrainState, make_optimizer, split_rows, update

RATE = 0.5
SGD = optax.sgd(RATE)  # a step shows the gradient itself
LOSS = LossConfig(kl_coef=0.05, kl_in_reward=0.01, agg_eps=0.0)


def recipe(micro: int = P):
    tiny = tiny_recipe()
    return dataclasses.replace(
        tiny, grpo=dataclasses.replace(tiny.grpo, prompts=2 * P, mini_prompts=P, micro_prompts=micro, shares=P, loss=LOSS)
    )


@functools.cache
def program(mesh=ONE, micro: int = P):
    return programs(mesh, recipe(micro), SGD)


def material(change: bool = False):
    """Prompts, gold, rollout, advantages and a bit of noise for the reference, numpy; `change` fills rows 0, 3 and 5 anew."""
    rng = np.random.default_rng(0)
    prompts, gold = batch(2 * P)
    tokens_PGR = rng.integers(0, 1000, (2 * P, G, R)).astype(np.int32)
    length_PG = rng.integers(1, R + 1, (2 * P, G)).astype(np.int32)
    length_PG[1, 0] = 0
    advantage_PG = rng.normal(size=(2 * P, G)).astype(np.float32)
    noise_PGR = rng.normal(0, 0.3, (2 * P, G, R)).astype(np.float32)
    if change:
        at = [0, 3, 5]
        tokens_PGR[at], advantage_PG[at], noise_PGR[at] = 17, 1e6, 40.0
        prompts = prompts.replace(tokens_PT=prompts.tokens_PT.copy(), length_P=prompts.length_P.copy())
        prompts.tokens_PT[at], prompts.length_P[at] = 5, 0
    zeros = np.zeros((2 * P, G, R), np.float32)
    rollout = Rollout(tokens_PGR, zeros, zeros.astype(np.int32), length_PG, np.zeros((2 * P, G), np.int32))
    return prompts, gold, rollout, advantage_PG, noise_PGR


def experience(run, weights, mesh=ONE, weight_P=None, change: bool = False) -> tuple[Experience, np.ndarray]:
    return given_experience(run, weights, mesh, *material(change), weight_P)


@functools.cache
def two_updates(mesh=ONE, micro: int = P, weight: bool = False, change: bool = False):
    """Old logprobs, parameters after each of two mini-batches, and their metrics, as numpy."""
    run = program(mesh, micro)
    reference, state = setup(mesh).reference(params(mesh)), setup(mesh).state(params(mesh), SGD)
    weight_P = np.isin(np.arange(2 * P), [0, 3, 5], invert=True).astype(np.float32) if weight else None
    given, old_PGR = experience(run, state.params, mesh, weight_P, change)
    after, metrics = [], []
    for index in range(2):
        state, numbers = run.update(state, reference, given, jnp.int32(index))
        after.append(jax.tree.map(np.array, state.params))
        metrics.append({name: float(value) for name, value in numbers.items()})
    assert int(state.updates) == 2
    return old_PGR, after, metrics


def close(ours, theirs, tolerance: float):
    largest = max(1.0, *(float(np.abs(x).max()) for x in jax.tree.leaves(theirs)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest), ours, theirs)


def test_the_first_update_needs_no_logprobs_from_before():
    """A step with one update does not score the policy: its logprobs are those that the update has anyway."""
    run, (_, after, metrics) = program(), two_updates()
    reference, state = setup().reference(params()), setup().state(params(), SGD)
    given, _ = experience(run, state.params)
    state, numbers = run.update(state, reference, given.replace(old_PQ=None), jnp.int32(0))
    close(jax.tree.map(np.array, state.params), after[0], 1e-6)
    assert numbers.keys() == metrics[0].keys() and numbers.pop("actor/ppo_kl") == 0
    for name, value in numbers.items():
        assert float(value) == pytest.approx(metrics[0][name], rel=1e-4, abs=1e-6), name


def same_run(ours, theirs, tolerance: float):
    (old, after, metrics), (old_1, after_1, metrics_1) = ours, theirs
    np.testing.assert_allclose(old, old_1, atol=1e-5)
    start = jax.tree.map(np.asarray, params())
    gradient = lambda end: jax.tree.map(lambda a, b: (a - b) / RATE, start, end)  # noqa: E731
    close(gradient(after[0]), gradient(after_1[0]), tolerance)
    close(after[1], after_1[1], tolerance)
    for got, expected in zip(metrics, metrics_1, strict=True):
        assert got.keys() == expected.keys()
        for name in got:
            assert got[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_every_mesh_gives_the_same_logprobs_gradients_and_losses(mesh):
    same_run(two_updates(mesh), two_updates(), 1e-5)
    assert abs(two_updates()[2][1]["actor/pg_loss"]) > 1e-3  # the second mini-batch's loss says something


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_add_up(micro):
    same_run(two_updates(micro=micro), two_updates(), 1e-6)


def test_the_ratio_is_one_on_the_first_mini_batch():
    first, second = two_updates()[2]
    assert abs(first["actor/ppo_kl"]) < 1e-6 and first["actor/pg_clipfrac"] == first["actor/pg_clipfrac_lower"] == 0
    assert abs(second["actor/ppo_kl"]) > 1e-3 and second["actor/pg_clipfrac"] > 0
    assert first["actor/kl_loss"] > 0.01 and first["actor/entropy"] > 1 and first["actor/grad_norm"] > 0.01


def test_the_state_is_donated():
    """One copy of parameters and optimiser exists at a time."""
    run = program()
    reference, state = setup().reference(params()), setup().state(jax.tree.map(jnp.copy, params()), SGD)
    given, _ = experience(run, state.params)
    after, _ = run.update(state, reference, given, jnp.int32(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, reference, given)))


def test_rows_of_weight_zero_count_nowhere():
    """Neither in the update nor in the statistics, whatever stands in them, an empty prompt included."""
    changed = two_updates(weight=True, change=True)
    rows = [0, 3, 5]
    assert np.abs(changed[0][rows] - two_updates(weight=True)[0][rows]).max() > 0.1
    changed[0][rows] = two_updates(weight=True)[0][rows]  # their old logprobs may differ, nothing else
    same_run(changed, two_updates(weight=True), 1e-6)
    assert two_updates(weight=True)[2][1]["actor/pg_loss"] != two_updates()[2][1]["actor/pg_loss"]
    stats = []
    for change in (False, True):
        run = program()
        prompts, gold, rollout, reward_PG, noise_PGR = material(change)
        gold = gold.replace(weight_P=np.isin(np.arange(2 * P), [0, 3, 5], invert=True).astype(np.float32))
        prompts, gold, rollout, reward_PG, noise_PGR = place_rows((prompts, gold, rollout, reward_PG, noise_PGR), run.mesh)
        choice, width = run.choose(rollout, None, gold)
        rows = run.arrange(rollout, prompts, gold, choice, width=width)
        judged = Judged(None, reward_PG, {"format": reward_PG}, None, None)
        noise_PQ = pack_values(noise_KGR := noise_PGR[choice.index_K], rows.packed)
        made, numbers = run.experience(rollout, judged, prompts, gold, choice, rows, noise_PQ, 0 * noise_PQ, Slots.none())
        weightless = np.isin(np.asarray(choice.index_K), [0, 3, 5])
        advantage_KG = np.asarray(made.advantage_PG).reshape(len(noise_KGR), G)
        assert (advantage_KG[weightless] == 0).all() and (advantage_KG[~weightless] != 0).any()
        kept = rollout.length_PG[~np.isin(np.arange(2 * P), [0, 3, 5])].sum()
        assert made.mask_PQ.sum() == kept
        stats.append((advantage_KG, {k: float(v) for k, v in numbers.items() if "prompt" not in k}))
    np.testing.assert_array_equal(stats[0][0], stats[1][0])
    assert stats[0][1] == stats[1][1] and stats[0][1]["critic/group_std"] > 0.1


def test_mini_batches_are_every_nth_row():
    tree = {"a": jnp.arange(12).reshape(6, 2), "b": jnp.arange(6)}
    parts = [split_rows(tree, 3, index) for index in range(3)]
    assert [part["b"].tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]] and parts[1]["a"].tolist() == [[2, 3], [8, 9]]
    assert split_rows(tree, 1, 0) is tree


def test_sums_and_counts_make_exact_means():
    """Unequal micro-batches: the mean is over all tokens, not a mean of means; an empty batch changes nothing and stays finite."""
    value, mask = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 1.0, 1.0, 0.0])

    def loss_sum(params, micro):
        value, mask = micro
        total = jnp.sum(params["w"] * value * mask)
        return total, {"mean": (total, mask.sum())}

    start = TrainState(jnp.int32(0), {"w": jnp.float32(3.0)}, optax.sgd(1.0).init({"w": jnp.float32(3.0)}))
    for parts in (1, 2, 4):
        state, metrics = update(start, optax.sgd(1.0), loss_sum, (value, mask), mask.sum(), parts)
        assert float(state.params["w"]) == 1.0 and float(metrics["mean"]) == 6.0 and float(metrics["actor/grad_norm"]) == 2.0
        state, metrics = update(start, optax.sgd(1.0), loss_sum, (value, 0 * mask), 0 * mask.sum(), parts)
        assert float(state.params["w"]) == 3.0 and float(metrics["mean"]) == 0.0


def test_a_gradient_that_is_no_number_changes_nothing_and_is_counted():
    """Also with momentum, and of one bad micro-batch of several; too many such steps in a row end the run."""
    optimizer = optax.adam(0.1)
    start = TrainState(jnp.int32(5), {"w": jnp.float32(3.0)}, optimizer.init({"w": jnp.float32(3.0)}))
    loss_sum = lambda params, micro: (jnp.sum(params["w"] * micro), {})  # noqa: E731
    good, bad = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, jnp.nan, 3.0, 4.0])
    for parts in (1, 4):
        state, metrics = update(start, optimizer, loss_sum, bad, jnp.float32(4), parts)
        assert metrics["actor/skipped"] == 1 and jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, start))
        state, metrics = update(start, optimizer, loss_sum, good, jnp.float32(4), parts)
        assert metrics["actor/skipped"] == 0 and state.updates == 6 and state.params["w"] != 3
    skips = Skips(OptimizerConfig(max_skipped=2))
    for step, skipped in enumerate((1, 1, 0.5, 1, 1), 1):  # half: one of two updates was made
        skips.see(step, skipped)
    with pytest.raises(ValueError, match="step 6 is no number, as those of the 2 steps before it"):
        skips.see(6, 1)


# --- the optimiser ------------------------------------------------------------------------------------------------------------


def rates(config: OptimizerConfig, updates: int, gradient: float = 1.0) -> list[float]:
    """What each of `updates` steps takes from a parameter under a constant gradient: Adam makes it the learning rate."""
    optimizer, w, seen = make_optimizer(config, updates), jnp.float32(0.0), []
    state = optimizer.init(w)
    for _ in range(updates):
        step, state = optimizer.update(jnp.float32(gradient), state, w)
        seen.append(-float(step))
    return seen


def test_schedules():
    plain = dict(learning_rate=0.1, weight_decay=0.0)
    n = np.arange(6)
    np.testing.assert_allclose(rates(OptimizerConfig(**plain), 6), 0.1, rtol=1e-4)
    np.testing.assert_allclose(rates(OptimizerConfig(**plain, schedule="linear"), 6), 0.1 * (1 - n / 6), rtol=1e-4)
    np.testing.assert_allclose(rates(OptimizerConfig(**plain, schedule="cosine"), 6), 0.05 * (1 + np.cos(np.pi * n / 6)), rtol=1e-4)
    warm = rates(OptimizerConfig(**plain, schedule="linear", warmup_steps=2), 6)
    np.testing.assert_allclose(warm, [0, 0.05, 0.1, 0.075, 0.05, 0.025], rtol=1e-4, atol=1e-9)


def test_gradients_are_clipped_by_their_global_norm_or_not_at_all():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    moment = {}
    for clip in (1.0, 10.0, 0.0):
        optimizer = make_optimizer(OptimizerConfig(grad_clip=clip, b1=0.0), 1)
        _, state = optimizer.update(tree, optimizer.init(tree), tree)
        moment[clip] = optax.tree_utils.tree_get(state, "mu")
    assert float(moment[1.0]["a"][0]) == pytest.approx(0.6) and float(moment[1.0]["b"][0]) == pytest.approx(0.8)
    for clip in (10.0, 0.0):  # 0: off
        assert float(moment[clip]["a"][0]) == pytest.approx(3.0) and float(moment[clip]["b"][0]) == pytest.approx(4.0)
