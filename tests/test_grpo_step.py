"""Whole GRPO steps on a 2 x 2 x 2 mesh, with rewards that an untrained model can earn."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny_recipe import G, P, R, materials, params, programs, setup, stopping, tiny_recipe

from pgjax.data.schema import IMAGE, TEXT
from pgjax.grpo.trainer import grpo_step, load
from pgjax.train.compilations import Compilations
from pgjax.train.update import make_optimizer

MESH = (2, 2, 2)
WIDTHS = (3 * R, 4 * R)
NAMES = (
    *("actor/pg_loss", "actor/kl_loss", "actor/entropy", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl", "actor/grad_norm"),
    *("critic/rewards/mean", "critic/group_std", "critic/frac_zero_std", "response_length/mean", "response_length/clip_ratio"),
    *("training/rollout_probs_diff_mean", "reward/format", "reward/request", "reward/category"),
)


class Rows:
    """Training batches of different kinds in turn: mixed, text alone, pictures alone."""

    def __init__(self, pipeline):
        pool = [pipeline.batch(k, 4 * P) for k in range(2)]
        self.prompt, self.gold = jax.tree.map(lambda *x: np.concatenate(x), *((b.prompt, b.gold) for b in pool))
        self.pool, self.kinds = pool[0], []

    def batch(self, step: int, prompts: int):
        wanted = (None, TEXT, None, IMAGE)[step % 4]
        rows = np.flatnonzero((self.gold.modality_P == wanted) if wanted is not None else np.arange(8 * P) >= step)[:prompts]
        assert len(rows) == prompts
        take = lambda tree: jax.tree.map(lambda x: x[rows], tree)  # noqa: E731
        self.kinds.append(wanted)
        return self.pool._replace(prompt=take(self.prompt), gold=take(self.gold))


@functools.cache
def five_steps():
    recipe = tiny_recipe()
    optimizer = make_optimizer(recipe.grpo.optimizer, 100)
    run = programs(MESH, recipe, optimizer, stopping(4))
    judge, choose, widths = run.judge, run.choose, []

    def rewarded(rollout, gold, bank):
        """The real judge, its reward replaced by something that differs between the answers."""
        judged = judge(rollout, gold, bank)
        assert (np.asarray(judged.reward_PG) == 0).all()  # nothing parses
        return judged.replace(reward_PG=jax.device_put((np.asarray(rollout.length_PG) % 5).astype(np.float32), judged.reward_PG.sharding))

    def wide_in_turn(*args):
        choice, width = choose(*args)
        widths.append(max(width, WIDTHS[len(widths) % 2]))
        return choice, widths[-1]

    run.judge, run.choose = rewarded, wide_in_turn
    rows = dataclasses.replace(materials(), train=Rows(materials().train))
    reference, state = setup(MESH).reference(params(MESH)), setup(MESH).state(params(MESH), optimizer)
    first, compilations = jax.tree.map(np.asarray, (state.params, reference)), Compilations()
    first = jax.tree.map(np.copy, first)
    log, compiled, phases = [], [], []
    for step in range(5):
        loaded = load(rows, recipe, run.mesh, step)
        state, metrics = grpo_step(run, rows.bank, recipe, state, reference, step, loaded, lambda phase, outputs: phases.append(phase))
        log.append({name: float(value) for name, value in metrics.items()})
        compiled.append(compilations.take())
    return first, jax.tree.map(np.asarray, (state.params, reference)), log, compiled, widths, rows.train.kinds, state


def test_metrics_are_finite_and_named_as_in_verl():
    log = five_steps()[2]
    for metrics in log:
        assert set(NAMES) <= metrics.keys() and all(np.isfinite(value) for value in metrics.values())
    assert all(m["critic/group_std"] > 0 and m["actor/grad_norm"] > 0 and 1 < m["response_length/mean"] < R for m in log)
    assert all(m["training/rollout_probs_diff_mean"] < 1e-5 for m in log)
    assert all(0 <= m["actor/kl_loss"] for m in log) and log[-1]["actor/kl_loss"] > log[0]["actor/kl_loss"]
    assert all(m["rollout/slot_waste"] >= 1 and 0 < m["update/pad_share"] < 1 for m in log)


def test_every_parameter_moves_and_the_reference_does_not():
    (before, reference), (after, reference_after), *_, state = five_steps()
    moved = jax.tree_util.tree_map_with_path(lambda path, a, b: (jax.tree_util.keystr(path), bool((a != b).any())), before, after)
    still = [name for name, changed in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple)) if not changed]
    assert not still
    jax.tree.map(np.testing.assert_array_equal, reference, reference_after)
    assert int(state.updates) == 5 * (P // tiny_recipe().grpo.mini_prompts)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail("moved"), state.params, setup(MESH).training)


def test_a_warm_run_compiles_nothing():
    """Batches of text alone, of pictures alone and mixed ones, in packed rows of both widths, after two steps that saw the widths."""
    *_, compiled, widths, kinds, _ = five_steps()
    assert set(widths[:2]) == set(widths[2:]) == set(WIDTHS) and {None, TEXT, IMAGE} <= set(kinds[2:]) | {kinds[1]}
    assert compiled[0] > 0
    assert compiled[2:] == [0, 0, 0]


def test_the_counter_counts():
    compilations = Compilations()
    f, x = jax.jit(lambda x: x * 3 + G), np.ones(7, np.float32)
    f(x)
    assert compilations.take() > 0
    f(x)
    assert compilations.take() == 0
