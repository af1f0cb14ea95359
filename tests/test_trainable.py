"""What is not trained stays as it was, costs no gradient and no memory of its own: a frozen vision tower, and LoRA."""

import dataclasses
import functools
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_qwen import QUICK
from tiny_recipe import ONE, G, P, R, batch, given_experience, host_params, materials, params, programs, setup, stopping, tiny_recipe

from pgjax.config import MeshConfig, Recipe
from pgjax.generate.decode import Rollout
from pgjax.grpo import trainer
from pgjax.grpo.trainer import grpo_step, load, train
from pgjax.models.qwen_vl import QwenVL
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.serving import guard
from pgjax.train import saved
from pgjax.train.run_folder import read_metrics
from pgjax.train.saved import open_run
from pgjax.train.trainable import base, merge, merge_adapters, split
from pgjax.train.update import make_optimizer

MODES = {"freeze": dict(freeze_vision=True), "lora": dict(lora_rank=2, lora_alpha=8.0)}
RATE = 0.5
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recipe(mode: str, **model) -> Recipe:
    """The tiny recipe on one device, with two steps of one update each: the ratio is 1 all through."""
    tiny = tiny_recipe()
    grpo = dataclasses.replace(tiny.grpo, steps=2, mini_prompts=P, micro_prompts=P, validate_every=2, checkpoint_every=1)
    model = dataclasses.replace(tiny.model, **MODES[mode], **model)
    return dataclasses.replace(
        tiny, model=model, mesh=MeshConfig(*ONE), devices=0, warm_up=dataclasses.replace(tiny.warm_up, steps=0), grpo=grpo
    )


def names(tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def copied(tree):
    return jax.tree.map(np.array, tree)


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.cache
def two_steps(mode: str):
    """Programs, trees before and after two steps, metrics, what each scoring gave, and how often a tower was traced and called."""
    made = recipe(mode)
    optimizer = make_optimizer(made.grpo.optimizer, made.grpo.steps)
    run = programs(ONE, made, optimizer, stopping(4))
    given, place = params(), setup(ONE, made.model)
    reference, state = place.reference(given), place.state(given, optimizer)
    before, towers, calls, scored, metrics = copied((state.params, reference)), [], [], [], []
    tower, encode, score = QwenVL.encode, run.encode, run.score

    def recorded(*args):
        scored.append(score(*args))
        return scored[-1]

    run.encode, run.score = lambda *args: calls.append(1) or encode(*args), recorded
    with mock.patch.object(QwenVL, "encode", lambda self, *args: towers.append(1) or tower(self, *args)):
        for step in range(2):
            state, numbers = grpo_step(
                run, materials().bank, made, state, reference, step, load(materials(), made, run.mesh, step), lambda *_: None
            )
            metrics.append({name: float(value) for name, value in numbers.items()})
    return run, state, reference, before, metrics, copied(scored), (len(towers), len(calls))


@pytest.mark.parametrize("mode", MODES)
def test_the_tower_runs_once_a_step_and_its_tokens_serve_all(mode):
    """No program but `encode` holds the tower, neither rollout, nor scoring, nor the update; and that runs once a step."""
    run, _, reference, _, metrics, scored, counts = two_steps(mode)
    assert counts == (1, 2)
    for numbers in metrics:
        assert abs(numbers["actor/ppo_kl"]) < 1e-6 and numbers["actor/pg_clipfrac"] == 0 and numbers["actor/grad_norm"] > 0
        assert numbers["training/rollout_probs_diff_mean"] < 1e-5
    np.testing.assert_array_equal(scored[0], scored[1])  # the policy starts as the reference, to the last bit
    assert np.abs(scored[2] - scored[3]).max() > 1e-4  # and leaves it


def test_a_frozen_tower_has_no_gradient_and_stays_the_same():
    _, state, reference, (before, _), *_ = two_steps("freeze")
    assert not any("visual" in name for name in names(state)) and "visual" in reference
    equal(reference["visual"], host_params()["visual"])
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.params, before))
    assert len(moved) > 10 and all(moved)


def test_adapters_alone_are_trained():
    _, state, reference, (before, reference_before), *_ = two_steps("lora")
    adapters = names(state.params)
    assert all(name.endswith(("['lora_a']", "['lora_b']")) for name in adapters) and len(adapters) == 2 * len(PROJECTIONS)
    assert all(any(projection in name for name in adapters) for projection in PROJECTIONS)
    assert size(state.opt_state) == 2 * size(state.params) + 8 and size(state.params) < size(reference) / 10  # two moments, two counts
    assert all((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (state.params, before)), strict=True))
    equal(reference, reference_before)
    equal(reference, host_params())


def logits(model: QwenVL, tree: dict) -> np.ndarray:
    b = batch()[0]
    args = (b.patches_PIB, b.patch_yx_PI2, b.grid_PI2, b.image_PI, b.tokens_PT, b.visual_PT, b.position_PTX, b.length_P)
    out = jax.jit(model.apply, compiler_options=QUICK)({"params": tree}, *args)
    return np.asarray(out)[np.arange(b.tokens_PT.shape[1]) < b.length_P[:, None]]


def test_merged_adapters_compute_the_same_and_without_them_it_is_the_base():
    _, state, reference, *_ = two_steps("lora")
    model, plain, config = setup(ONE, recipe("lora").model).model, setup().model, recipe("lora").model
    policy = merge(state.params, reference)
    assert jax.tree.structure(base(policy)) == jax.tree.structure(setup().abstract)
    expected, found = logits(model, policy), logits(plain, merge_adapters(policy, config))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(logits(model, reference), logits(plain, reference))
    assert np.abs(expected - logits(plain, reference)).max() > 1e-3


def test_parts_of_a_tree():
    tree = {"visual": {"a": 1}, "model": {"q_proj": {"kernel": 2, "lora_a": 3, "lora_b": 4}}}
    whole, freeze, lora = tiny_recipe().model, recipe("freeze").model, recipe("lora").model
    assert split(base(tree), whole) == (base(tree), {})
    assert split(base(tree), freeze) == ({"model": {"q_proj": {"kernel": 2}}}, {"visual": {"a": 1}})
    assert split(tree, lora) == ({"model": {"q_proj": {"lora_a": 3, "lora_b": 4}}}, base(tree))
    for config in (freeze, lora):
        assert merge(*split(tree, config)) == tree
    assert merge({"visual": {"a": 5}}, tree) == tree | {"visual": {"a": 5}}


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_kept_in_the_compute_type(mode):
    made, types = setup(ONE, recipe(mode, compute_dtype="bfloat16").model), lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
    given = params()
    reference, state = made.reference(given), made.state(given, optax.sgd(1.0), seed=3)
    assert types(reference) == {"bfloat16"} and types(state.params) == {"float32"}
    same = lambda x, a: (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, (state, reference), (made.abstract_state(optax.sgd(1.0)), made.abstract_reference()))))


def one_update(mesh):
    """Logprobs of a policy with adapters that say something, and their gradient and metrics in one SGD update."""
    made, rng = recipe("lora"), np.random.default_rng(0)
    run, place = programs(mesh, made, optax.sgd(RATE)), setup(mesh, made.model)
    reference, state = place.reference(params(mesh)), place.state(params(mesh), optax.sgd(RATE))
    start = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), place.trained(place.abstract))
    state = state.replace(params=jax.device_put(start, place.trained(place.training)))
    zeros = np.zeros((P, G, R), np.int32)
    tokens_PGR, length_PG = rng.integers(0, 1000, zeros.shape).astype(np.int32), rng.integers(1, R + 1, (P, G)).astype(np.int32)
    rollout = Rollout(tokens_PGR, zeros.astype(np.float32), zeros, length_PG, zeros[..., 0])
    advantage_PG, noise_PGR = (rng.normal(0, scale, shape).astype(np.float32) for scale, shape in ((1, (P, G)), (0.1, zeros.shape)))
    prompts, gold = batch()
    policy = merge(state.params, reference)
    visual = run.encode(run.gather(policy), place_rows(prompts, run.mesh))
    experience, logp_PGR = given_experience(run, policy, mesh, prompts, gold, rollout, advantage_PG, noise_PGR, visual=visual)
    experience = experience.replace(old_PQ=2 * experience.old_PQ - experience.ref_PQ)  # noise the other way
    state, metrics = run.update(state, reference, experience, jnp.int32(0))
    gradient = jax.tree.map(lambda a, b: (a - np.asarray(b)) / RATE, start, state.params)
    return logp_PGR, gradient, {name: float(value) for name, value in metrics.items()}


def test_an_update_of_adapters_is_the_same_on_every_mesh():
    (logp, gradient, metrics), (logp_1, gradient_1, metrics_1) = one_update((2, 2, 2)), one_update(ONE)
    np.testing.assert_allclose(logp, logp_1, rtol=1e-5, atol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient_1))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, largest)), gradient, gradient_1)
    assert metrics == pytest.approx(metrics_1, rel=1e-5, abs=1e-5)


# --- a whole run ---------------------------------------------------------------------------------------------------------------


def test_a_run_of_adapters_goes_on_where_it_stopped_and_is_loaded_whole(tmp_path, monkeypatch):
    """Its checkpoints hold adapters alone, its reference the base, once; the guard and the parameters of the run have both."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
    for module in (trainer, saved):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    made, path, broken = recipe("lora"), tmp_path / "tiny", tmp_path / "broken"
    train(made, path)
    shutil.copytree(path, broken)
    shutil.rmtree(broken / "checkpoints" / "2")
    (broken / "summary.json").unlink()
    train(made, broken)
    lasting = lambda row: {name: value for name, value in row.items() if not name.startswith(("perf/", "timing_s/"))}  # noqa: E731
    assert list(map(lasting, read_metrics(broken))) == list(map(lasting, read_metrics(path)))
    on_disk = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # noqa: E731
    assert on_disk(path / "checkpoints" / "2") < on_disk(path / "reference" / "0") / 3

    place = setup(ONE, made.model)
    found = open_run(path).params
    assert jax.tree.structure(found) == jax.tree.structure(place.abstract)
    equal(found, open_run(broken).params)
    adapters = split(found, made.model)[0]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters))
    with guard.Guard.load(path) as loaded:
        equal(loaded.engine.weights, found)
    equal(base(found), place.init(made.seed))  # bit for bit what the run began with, tower and all
