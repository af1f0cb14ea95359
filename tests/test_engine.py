"""The engine against the rollout: whoever comes and goes beside it, an answer is the one that a batch of its own would give."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import QUICK
from tiny_recipe import ONE, P, R, batch, host_params, materials, setup, tiny_recipe
from waits import until

from pgjax import automaton as answers
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.labels import answer_scorer
from pgjax.generate.law import Law
from pgjax.generate.score import answer_rows
from pgjax.serving.engine import Ask, Engine, Full, Stopped
from pgjax.serving.forks import SLOTS, Fork, portions
from pgjax.tokenizer import never_sampled
from pgjax.train.compilations import Compilations

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


def test_an_engine_may_run_for_years(expected):
    """The number of steps so far, by which rings go round, does not outgrow its type; R is no power of two here, which would hide it."""
    made, limit = setup(), 27
    weights = jax.device_put(host_params(), made.rollout)
    with Engine(made, weights, law(True).replace(limit=limit), DATA.prompt_tokens, DATA.patches, rows=4, queue=16, steps=5) as engine:
        fresh = engine._vacant
        late = lambda batch: batch.replace(running=batch.running.replace(time=jnp.int32(2**31 - 7)))  # noqa: E731
        engine._vacant = lambda law: late(fresh(law))
        [told] = engine.submit(ask(5, bound=False, limit=limit)).result()
    assert told.tokens == expected[False][5][:limit] and len(told.tokens) > 7


def test_samples_share_a_prefill_and_depend_on_seed_and_number_alone(engine):
    with pytest.raises(ValueError, match="takes 1 to 4"):
        engine.submit(ask(0, samples=5))
    before = engine.counts.prefills
    drawn = [told.tokens for told in engine.submit(ask(0, samples=4, temperature=1.0, seed=7)).result()]
    assert engine.counts.prefills == before + 1 and len(set(map(tuple, drawn))) > 1
    beside = [engine.submit(ask(p), wait=True) for p in (1, 2, 3)]
    again = engine.submit(ask(0, samples=2, temperature=1.0, seed=7), wait=True).result()
    assert [told.tokens for told in again] == drawn[:2]
    assert engine.submit(ask(0, temperature=1.0, seed=8), wait=True).result()[0].tokens != drawn[0]
    assert all(future.result() for future in beside)


def test_a_limit_is_kept_and_bound_answers_end_in_it(engine):
    shortest = int(np.asarray(law(True).automaton.distance_AJ)[ask(0).start][ask(0).outcome_J].min())
    for limit in (shortest, shortest + 3):
        [told] = engine.submit(ask(0, limit=limit)).result()
        assert len(told.tokens) <= limit and materials().automaton.parsed_A[told.state]
    [told] = engine.submit(ask(0, limit=5, bound=False)).result()
    assert len(told.tokens) == 5


def test_tails_are_scored_as_whole_answers_are(engine):
    """Behind every token of the answer and behind the prompt, more of them than go at a time: the logprobs of a forward pass over prompt,
    answer, stem and tail."""
    tails = {"long": [301, 5, 17, 44, 9], "one": [44], "other": [5, 17, 301]} | {f"{k}": [k, k + 1, 7] for k in range(40)}
    made: dict[str, Fork] = {}

    def forks(tokens):
        branches = 0, 1, 2, len(tokens) // 2, len(tokens) - 1, len(tokens)
        made.update({f"{k}": Fork(f"{k}", branch, [12, 700, 3][: k % 4], tails) for k, branch in enumerate(branches)})
        return list(made.values())

    futures = [(p, engine.submit(ask(p, forks=forks, bound=False, limit=R - 9), wait=True)) for p in (0, 3, 5)]
    scorer = answer_scorer(MODEL, law(False), setup().mesh)
    for p, future in futures:
        [told] = future.result()
        assert {name: scores.keys() for name, scores in told.scores.items()} == {name: tails.keys() for name in made}
        for name in ("long", "one", "other", "39"):
            ids = [[*told.tokens[: fork.branch], *fork.stem, *tails[name]] for fork in made.values()]
            tokens_PGR, length_PG = answer_rows([ids], R)
            logp_PQ = scorer(host_params(), ask(p).prompt, tokens_PGR, length_PG)[0]
            for fork, end in zip(made, np.cumsum(length_PG[0]), strict=True):
                expected = logp_PQ[end - len(tails[name]) : end].sum()
                np.testing.assert_allclose(told.scores[fork][name], expected, atol=5e-5)


def test_portions_hold_every_tail_once_and_fit():
    forks = [Fork("a", 1, [1] * 9, {f"{k}": [2] * (k % 7 + 1) for k in range(60)}), Fork("b", 2, [], {"x": [3] * (SLOTS - 1)})]
    parts = list(portions(forks))
    found = [(fork.name, name) for part in parts for fork in part for name in fork.tails]
    assert found == [("a", f"{k}") for k in range(60)] + [("b", "x")]
    assert all(sum(1 + len(f.stem) + sum(map(len, f.tails.values())) for f in part) <= SLOTS for part in parts)
    with pytest.raises(ValueError, match="more than"):
        list(portions([Fork("c", 1, [1], {"x": [3] * (SLOTS - 1)})]))


def test_nothing_compiles_for_another_request(engine):
    run = lambda: [f.result() for f in [engine.submit(ask(p, forks=lambda t: [Fork("", 0, [], {"": [1]})]), wait=True) for p in range(P)]]  # noqa: E731
    run()
    compilations = Compilations()
    run()
    engine.submit(ask(1, temperature=0.5, seed=3, limit=R - 2, bound=False)).result()
    assert compilations.take() == 0


def test_who_does_not_wait_any_more_frees_his_row(engine):
    """Passed deadlines and cancelled futures, in the queue and in the batch; those beside them get what they would have got."""
    expected = engine.submit(ask(2)).result()[0].tokens
    late = [engine.submit(ask(p, deadline=time.monotonic() - 1), wait=True) for p in range(3)]
    gone = [engine.submit(ask(p), wait=True) for p in range(6)]
    for future in gone[::2]:
        future.cancel()
    stays = engine.submit(ask(2), wait=True)
    assert stays.result()[0].tokens == expected
    for future in late:
        with pytest.raises(TimeoutError, match="deadline"):
            future.result()
    assert all(future.cancelled() or future.result() for future in gone)
    until(lambda: engine.counts.busy == engine.counts.waiting == 0)


def test_a_full_queue_refuses_and_a_failure_is_told_and_survived(engine, monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def stuck(*args, **kwargs):
        entered.set()
        go_on.wait()
        raise RuntimeError("a program failed")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_advance", stuck)
        inside = engine.submit(ask(0))
        assert entered.wait(60)
        waiting = [engine.submit(ask(1)) for _ in range(engine.queue)]
        with pytest.raises(Full, match="waiting already"):
            engine.submit(ask(2))
    go_on.set()
    with pytest.raises(RuntimeError, match="a program failed"):
        inside.result()
    assert len({tuple(future.result()[0].tokens) for future in waiting}) == 1 and engine.counts.failures == 1


def test_what_one_asker_does_wrong_is_his_alone(engine):
    def broken(tokens):
        raise KeyError("mine")

    futures = [engine.submit(ask(0, forks=broken)), engine.submit(ask(1)), engine.submit(ask(2, heard=broken)), engine.submit(ask(3))]
    assert all(futures[k].result() for k in (1, 3))
    for k in (0, 2):
        with pytest.raises(KeyError, match="mine"):
            futures[k].result()
    assert engine.counts.failures <= 1  # that of another test


def test_a_stream_hears_the_answer_grow(engine):
    heard: list[list[int]] = []
    [told] = engine.submit(ask(1, heard=lambda tokens: heard.append(tokens))).result()
    assert heard[-1] == told.tokens and len(heard) > 1
    assert all(a == b[: len(a)] for a, b in zip(heard, heard[1:], strict=False))


def test_stopping_tells_those_who_wait():
    made = setup()
    weights = jax.device_put(host_params(), made.rollout)
    engine = Engine(made, weights, law(True), DATA.prompt_tokens, DATA.patches, rows=4, queue=16, steps=5)
    futures = [engine.submit(ask(p)) for p in range(8)]
    engine.stop()
    assert any(isinstance(future.exception(), Stopped) for future in futures) and all(future.done() for future in futures)
    with pytest.raises(Stopped):
        engine.submit(ask(0))


@pytest.mark.parametrize("how", [{"seed": -1}, {"seed": 2**32}, {"limit": R + 1}, {"limit": 0}, {"samples": 0}])
def test_what_cannot_be_asked_is_refused_and_harms_nobody(engine, how):
    future = engine.submit(ask(1), wait=True)
    with pytest.raises(ValueError):
        engine.submit(ask(0, **how))
    assert future.result()


def test_requests_that_nobody_waits_for_leave_the_queue(engine, monkeypatch):
    """At the next look, also behind one who waits for more rows than are free."""
    entered, go_on, waiting = threading.Event(), threading.Event(), []
    advance = engine._advance

    def watched(*args):
        waiting.append(engine.counts.waiting)
        entered.set()
        go_on.wait()
        return advance(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_advance", watched)
        first = engine.submit(ask(0))
        assert entered.wait(60)
        large = engine.submit(ask(1, samples=4))
        behind = [engine.submit(ask(2)) for _ in range(engine.queue - 1)]
        [future.cancel() for future in behind]
        go_on.set()
        assert first.result() and large.result()
    assert waiting[1] <= 1 and len(first.result()[0].tokens) > 5  # the first one was still running then


def test_a_row_that_is_given_up_is_taken_by_the_next(engine, expected):
    """Rows are cancelled in the same moment in which others wait for them."""
    first = [engine.submit(ask(p % P), wait=True) for p in range(engine.rows)]
    while engine.counts.busy < engine.rows and not any(future.done() for future in first):
        pass
    behind = [engine.submit(ask(p), wait=True) for p in (5, 6)]
    [future.cancel() for future in first]
    for p, future in zip((5, 6), behind, strict=True):
        [told] = future.result(60)
        assert told.tokens == expected[True][p][: len(told.tokens)] and len(expected[True][p]) - len(told.tokens) <= 2
