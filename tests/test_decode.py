"""Decoding against what the same answers get from a plain forward pass, and draws that depend on step, prompt and sample alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_qwen import QUICK
from tiny_recipe import MESHES, ONE, G, P, R, batch, host_params, materials, params, programs, setup, stopping, tiny_recipe

from pgjax import automaton as answers
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.law import Law
from pgjax.generate.score import pack, pack_values, per_answer, score
from pgjax.parallel.mesh import place_rows
from pgjax.tokenizer import never_sampled

MODEL = setup().model
TEMPERATURE = 0.7
BLOCKED_V = never_sampled(materials().tokenizer, MODEL.config.text.vocab)


def law(automaton, gold, constrained=False) -> Law:
    distance_PA = answers.distances(automaton, answers.outcome_mask(automaton, gold.node_of_id_PK)) if constrained else None
    return Law(jnp.asarray(BLOCKED_V), automaton, distance_PA, R, TEMPERATURE, constrained)


@functools.partial(jax.jit, static_argnames=("group", "greedy", "lanes", "rows"), compiler_options=QUICK)
def rollout_and_slots(params, law, prompts, gold, step=0, group=G, greedy=False, lanes=0, rows=0):
    start = prefill(MODEL, params, prompts, encode(MODEL, params, prompts))
    how = dict(group=group, greedy=greedy, lanes=lanes, rows=rows)
    return decode(MODEL, params, prompts, gold.modality_P, start, law, jax.random.key(3), step, **how)


def rollout(*args, **options):
    return rollout_and_slots(*args, **options)[0]


@functools.cache
def free(greedy: bool = False):
    """Unconstrained answers of many lengths, as numpy."""
    prompts, gold = batch()
    return jax.tree.map(np.asarray, rollout(host_params(), law(stopping(), gold), prompts, gold, greedy=greedy))


def as_one_prompt(tokens_PGR) -> np.ndarray:
    """Logits before each answer token [P, G, R, V] with the answers written into longer prompts: no cache, no packing, no delta."""
    prompts, _ = batch()
    repeat = lambda x: np.repeat(x, G, axis=0)  # noqa: E731
    grow = lambda x, fill: np.concatenate([x, np.full((P, R, *x.shape[2:]), fill, x.dtype)], axis=1)  # noqa: E731
    tokens, visual, position = (repeat(grow(x, f)) for x, f in ((prompts.tokens_PT, 0), (prompts.visual_PT, -1), (prompts.position_PTX, 0)))
    length = repeat(prompts.length_P)
    for row, end in enumerate(length):
        tokens[row, end : end + R] = tokens_PGR.reshape(P * G, R)[row]
        position[row, end : end + R] = position[row, :end].max() + 1 + np.arange(R)[:, None]
    run = jax.jit(lambda params, *args: MODEL.apply({"params": params}, *args), compiler_options=QUICK)
    patches = (repeat(x) for x in (prompts.patches_PIB, prompts.patch_yx_PI2, prompts.grid_PI2, prompts.image_PI))
    logits = np.asarray(run(host_params(), *patches, tokens, visual, position, length + R))
    return np.stack([x[end - 1 : end - 1 + R] for x, end in zip(logits, length, strict=True)]).reshape(P, G, R, -1)


def test_an_answer_ends_at_its_first_stop_token():
    got, stop_V = free(), np.asarray(stopping().stop_V)
    inside = np.arange(R) < got.length_PG[..., None]
    stops = stop_V[got.tokens_PGR] & inside
    last = np.arange(R) == got.length_PG[..., None] - 1
    assert not (stops & ~last).any()
    assert (stops.any(-1) | (got.length_PG == R)).all()  # the length counts the stop token
    assert len(set(got.length_PG.ravel())) > 6 and (got.length_PG == R).any() and (got.length_PG < R // 2).any()
    for behind in (got.tokens_PGR, got.logp_PGR):
        assert (behind[~inside] == 0).all()
    assert (got.logp_PGR[inside] < 0).all() and not BLOCKED_V[got.tokens_PGR[inside]].any()


def test_states_are_those_of_the_automaton():
    (_, gold), got, automaton = batch(), free(), stopping()
    table, class_V = np.asarray(automaton.next_state_AC), np.asarray(automaton.token_class_V)
    for p, g in np.ndindex(P, G):
        state = int(automaton.start_M[gold.modality_P[p]])
        for r in range(got.length_PG[p, g]):
            assert got.state_PGR[p, g, r] == state
            state = table[state, class_V[got.tokens_PGR[p, g, r]]]
        assert got.final_PG[p, g] == state


def test_logprobs_are_those_of_one_longer_prompt():
    """Positions go on at length + delta + offset behind pictures too; the temperature and the vocabulary mask are in the law."""
    got = free()
    logits = np.where(BLOCKED_V, -np.inf, as_one_prompt(got.tokens_PGR) / TEMPERATURE)
    logp = np.asarray(jax.nn.log_softmax(logits))
    expected = np.take_along_axis(logp, got.tokens_PGR[..., None], axis=-1)[..., 0]
    inside = np.arange(R) < got.length_PG[..., None]
    assert batch()[0].delta_P.min() < 0
    np.testing.assert_allclose(got.logp_PGR[inside], expected[inside], atol=1e-5)


def test_greedy_is_the_argmax_under_its_own_answers():
    got = free(greedy=True)
    logits = np.where(BLOCKED_V, -np.inf, as_one_prompt(got.tokens_PGR))
    inside = np.arange(R) < got.length_PG[..., None]
    best, second = np.moveaxis(np.sort(logits, axis=-1)[..., :-3:-1], -1, 0)
    clear = inside & (best - second > 1e-4)
    assert clear.sum() > 0.95 * inside.sum() and inside.sum() > 100
    assert (got.tokens_PGR == logits.argmax(-1))[clear].all()
    assert (got.tokens_PGR == got.tokens_PGR[:, :1]).all()  # no noise: all answers of a group are one


@pytest.mark.parametrize("constrained", [False, True])
def test_sampler_and_scorer_agree(constrained):
    """Logprobs of the rollout are those of `score`, renormalised alike under the constraint; and so is the scored entropy's support."""
    prompts, gold = batch()
    automaton = materials().automaton if constrained else stopping()
    rules = law(automaton, gold, constrained)
    got = rollout(host_params(), rules, prompts, gold)
    packed = pack(got.tokens_PGR, got.state_PGR, got.length_PG, G * R)
    run = jax.jit(lambda params, packed, law: score(MODEL, params, prompts, packed, law), compiler_options=QUICK)
    logp_PQ, entropy_PQ = run(host_params(), packed, rules)
    np.testing.assert_allclose(logp_PQ, pack_values(got.logp_PGR, packed), atol=1e-5)
    np.testing.assert_allclose(per_answer(logp_PQ, packed, G), got.logp_PGR.sum(-1), rtol=1e-5, atol=1e-4)
    assert (np.asarray(entropy_PQ) > -1e-6).all() and np.asarray(entropy_PQ).max() < np.log((~BLOCKED_V).sum())
    if constrained:
        verdict = jax.tree.map(np.asarray, answers.verdict(automaton, got.final_PG))
        ends = np.take_along_axis(np.asarray(got.tokens_PGR), np.asarray(got.length_PG)[..., None] - 1, axis=-1)
        assert verdict.parsed.all() and np.asarray(automaton.stop_V)[ends].all()
        assert all(k < 0 or gold.node_of_id_PK[p, k] >= 0 for p, row in enumerate(verdict.id) for k in row)
        free_rules = rules.replace(constrained=False)
        assert np.abs(np.asarray(run(host_params(), packed, free_rules)[0] - logp_PQ)).max() > 1  # the law did change


def test_draws_depend_on_step_prompt_and_sample_alone():
    (prompts, gold), rules = batch(2 * P), law(stopping(), None)
    rows = lambda tree, order: jax.tree.map(lambda x: x[order], tree)  # noqa: E731

    def draw(order, **options):
        order = np.asarray(order)
        return jax.tree.map(np.asarray, rollout(host_params(), rules, rows(prompts, order), rows(gold, order), **options))

    first = draw(range(P))
    np.testing.assert_array_equal(first.tokens_PGR, free().tokens_PGR)
    turned = draw(range(P)[::-1])  # another order
    np.testing.assert_array_equal(turned.tokens_PGR[::-1], first.tokens_PGR)
    others = draw([*range(P, 2 * P - 3), 2, 1, 2])  # other neighbours, one prompt twice
    np.testing.assert_array_equal(others.tokens_PGR[-3:], first.tokens_PGR[[2, 1, 2]])
    smaller = draw(range(P), group=2)  # another group size
    np.testing.assert_array_equal(smaller.tokens_PGR, first.tokens_PGR[:, :2])
    again = draw(range(P), step=1)
    assert (again.tokens_PGR[..., 0] != first.tokens_PGR[..., 0]).mean() > 0.5
    assert len(set(map(tuple, first.tokens_PGR[:, :, 0]))) == P  # prompts and samples have noise of their own
    assert np.mean([len(set(row)) for row in first.tokens_PGR[:, :, 0]]) > G / 2


@pytest.mark.parametrize(("lanes", "rows"), [(3, 0), (2, 2), (1, 1)])
def test_answers_do_not_depend_on_lanes_and_rows(lanes, rows):
    """Fewer lanes than answers, fewer rows than prompts: rings go round, lanes and rows are taken over, and nothing changes."""
    (prompts, gold), all_at_once = batch(), free()
    got, slots = rollout_and_slots(host_params(), law(stopping(), gold), prompts, gold, lanes=lanes, rows=rows)
    for name in ("tokens_PGR", "state_PGR", "length_PG", "final_PG"):
        np.testing.assert_array_equal(getattr(got, name), getattr(all_at_once, name))
    np.testing.assert_allclose(got.logp_PGR, all_at_once.logp_PGR, atol=2e-5)
    assert slots.used.sum() == got.length_PG.sum() and (slots.used <= slots.computed).all()
    steps = int(slots.computed.sum()) // ((rows or P) * lanes)
    if (lanes, rows) == (1, 1):
        assert steps == got.length_PG.sum()  # no slot is wasted


@functools.cache
def on_mesh(mesh, lanes: int = 0, rows: int = 0) -> np.ndarray:
    """Tokens [P, G, R] of the rollout program, for equal parameters."""
    optimizer = optax.sgd(1.0)
    by = dataclasses.replace(tiny_recipe().rollout, group=2 * G, lanes=lanes, rows=rows)
    program = programs(mesh, dataclasses.replace(tiny_recipe(), rollout=by), optimizer)
    prompts, gold = place_rows(batch(2 * P), program.mesh)
    weights = program.gather(params(mesh))
    got, _ = program.rollout(weights, prompts, gold, 4, group=2 * G, greedy=False)
    assert len(got.tokens_PGR.sharding.device_set) == np.prod(mesh)
    return np.asarray(got.tokens_PGR)


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_equal_parameters_give_equal_samples_on_every_mesh(mesh):
    tokens_PGR = on_mesh(mesh)
    assert (tokens_PGR > 0).sum() > 3000
    np.testing.assert_array_equal(tokens_PGR, on_mesh(ONE))


def test_lanes_and_rows_on_a_mesh_give_the_same_samples():
    """Every shard has its own queue of prompts."""
    np.testing.assert_array_equal(on_mesh(MESHES[1], lanes=3, rows=P), on_mesh(ONE))
