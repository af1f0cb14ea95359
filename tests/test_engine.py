"""The engine against the rollout: whoever comes and goes beside it, an answer is the one that a batch of its own would give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import QUICK
from tiny_recipe import ONE, P, R, batch, host_params, materials, setup, tiny_recipe

from pgjax import automaton as answers
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.law import Law
from pgjax.serving.engine import Ask, Engine
from pgjax.tokenizer import never_sampled

MODEL, DATA = setup().model, tiny_recipe().data
BLOCKED_V = jnp.asarray(never_sampled(materials().tokenizer, MODEL.config.text.vocab))
MESHES = (ONE, (2, 2, 2))


def law(constrained: bool) -> Law:
    m = materials()
    return Law(BLOCKED_V, m.automaton, None, R, constrained=constrained)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def engine(request):
    made = setup(request.param)
    weights = jax.device_put(host_params(), made.rollout)
    with Engine(made, weights, law(True), DATA.prompt_tokens, DATA.patches, rows=4, queue=2 * P, steps=5) as engine:
        yield engine


def ask(p: int, **how) -> Ask:
    prompts, gold = batch()
    one = jax.tree.map(lambda x: x[p : p + 1], prompts)
    outcome_J = np.asarray(answers.outcome_mask(materials().automaton, gold.node_of_id_PK[p]))
    return Ask(one, int(materials().automaton.start_M[gold.modality_P[p]]), outcome_J, **{"limit": R} | how)


@pytest.fixture(scope="module")
def expected():
    """Greedy answers of the rollout program, bound and free."""
    prompts, gold = batch()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def program(params, prompts, gold, rules):
        start = prefill(MODEL, params, prompts, encode(MODEL, params, prompts))
        how = dict(group=1, greedy=True)
        return decode(MODEL, params, prompts, gold.modality_P, start, rules, jax.random.key(0), jnp.int32(0), **how)[0]

    def run(constrained):
        m = materials()
        rules = law(constrained).replace(distance_PA=answers.distances(m.automaton, answers.outcome_mask(m.automaton, gold.node_of_id_PK)))
        got = jax.tree.map(np.asarray, program(host_params(), prompts, gold, rules))
        return [tokens[0, : length[0]].tolist() for tokens, length in zip(got.tokens_PGR, got.length_PG, strict=True)]

    return {constrained: run(constrained) for constrained in (True, False)}


def test_greedy_answers_are_those_of_the_rollout(engine, expected):
    """Eight requests through four rows, in an order of their own, bound and free ones side by side."""
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    futures = {(p, bound): engine.submit(ask(p, bound=bound), wait=True) for p in order for bound in (True, False)}
    for (p, bound), future in futures.items():
        [told] = future.result()
        whole = expected[bound][p]
        if bound:  # ends with the answer's last tag; the rollout goes on to a stop token
            assert told.tokens == whole[: len(told.tokens)] and len(whole) - len(told.tokens) <= 2
            assert materials().automaton.parsed_A[told.state]
        else:
            assert told.tokens == whole


def test_a_row_that_is_given_up_is_taken_by_the_next(engine, expected):
    """Rows are cancelled in the same moment in which others wait for them."""
    first = [engine.submit(ask(p), wait=True) for p in range(engine.rows)]
    while engine.counts.busy < engine.rows and not any(future.done() for future in first):
        pass
    behind = [engine.submit(ask(p), wait=True) for p in (5, 6)]
    [future.cancel() for future in first]
    for p, future in zip((5, 6), behind, strict=True):
        [told] = future.result(60)
        assert told.tokens == expected[True][p][: len(told.tokens)] and len(expected[True][p]) - len(told.tokens) <= 2
