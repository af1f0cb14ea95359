"""The law of answer tokens: what is never drawn, what temperature, top-k and top-p do, and that a constrained answer always ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipe import G, R, materials, tiny_recipe

from pgjax import automaton as answers
from pgjax.data.schema import IMAGE, TEXT, TEXT_IMAGE
from pgjax.generate import law as laws
from pgjax.generate.law import Law
from pgjax.tokenizer import never_sampled

DRAWS = 20_000


def drawn(logp_V, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Counts of tokens over many draws."""
    keys = laws.answer_keys(jax.random.key(0), 0, jnp.zeros(1, jnp.uint32), DRAWS)
    tokens = laws.sample(jnp.broadcast_to(logp_V, (1, DRAWS, len(logp_V))), keys, jnp.zeros((1, DRAWS), jnp.int32), False, top_k, top_p)
    return np.bincount(np.asarray(tokens).ravel(), minlength=len(logp_V))


def unconstrained(blocked_V, temperature: float = 1.0) -> Law:
    return Law(jnp.asarray(blocked_V), materials().automaton, None, R, temperature)


def test_what_is_never_sampled():
    """Image and vision tokens, role marks, and rows past the tokenizer; both stop tokens can be drawn."""
    tokenizer, vocab = materials().tokenizer, tiny_recipe().model.text.vocab
    blocked_V = never_sampled(tokenizer, vocab)
    out = set(tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>"]))
    assert len(out) == 5 and vocab > len(tokenizer)
    assert set(np.flatnonzero(blocked_V)) == out | set(range(len(tokenizer), vocab))
    logits_V = np.where(blocked_V, 5.0, 0.0)  # a model that would love to
    logp_V = laws.log_probs(unconstrained(blocked_V), jnp.asarray(logits_V)[None, None], jnp.zeros((1, 1), jnp.int32), 0)[0, 0]
    assert np.isfinite(logp_V).all()
    counts_V = drawn(logp_V)
    assert counts_V[blocked_V].sum() == 0 and (counts_V[~blocked_V] > 0).mean() > 0.99
    np.testing.assert_allclose(logp_V[~blocked_V], -np.log((~blocked_V).sum()), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_one_in_the_law_and_in_the_draws(temperature):
    rng = np.random.default_rng(1)
    logits_V = rng.normal(0, 1.5, 12)
    expected = np.exp(logits_V / temperature) / np.exp(logits_V / temperature).sum()
    law = unconstrained(np.zeros(12, bool), temperature)
    logp_V = laws.log_probs(law, jnp.asarray(logits_V)[None, None], jnp.zeros((1, 1), jnp.int32), 0)[0, 0]
    np.testing.assert_allclose(np.exp(logp_V), expected, rtol=1e-5)
    np.testing.assert_allclose(drawn(logp_V) / DRAWS, expected, atol=5 * np.sqrt(0.25 / DRAWS))


def kept(p_V: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """By the book: the k likeliest, renormalised; of these the fewest, likeliest first, whose mass reaches p."""
    order = np.argsort(-p_V)[: top_k or None]
    mass = np.cumsum(p_V[order] / p_V[order].sum())
    return set(order[: int(np.searchsorted(mass, top_p - 1e-9)) + 1])


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.6), (0, 0.85), (0, 0.01), (4, 0.7), (2, 0.5), (6, 0.99), (50, 1.0)])
def test_top_k_and_top_p(top_k, top_p):
    rng = np.random.default_rng(top_k)
    p_V = rng.permutation(np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.03]))
    counts_V = drawn(jnp.log(jnp.asarray(p_V, jnp.float32)), min(top_k, 8), top_p)
    expected = kept(p_V, min(top_k, 8), top_p)
    assert set(np.flatnonzero(counts_V)) == expected
    share = np.where(np.isin(np.arange(8), list(expected)), p_V, 0)
    np.testing.assert_allclose(counts_V / DRAWS, share / share.sum(), atol=5 * np.sqrt(0.25 / DRAWS))


def test_top_p_after_top_k_keeps_equal_tokens():
    """The mass of top-p is that of what top-k left; equal probabilities must not fall through the comparison."""
    counts_V = drawn(jnp.full(4, jnp.log(0.25)).at[3].set(-9.0), 3, 0.9)
    assert (counts_V[:3] > 0).all() and counts_V[3] == 0


def test_keys_name_step_prompt_and_sample():
    key, ids = jax.random.key(3), jnp.array([5, 9, 5], jnp.uint32)
    keys = np.asarray(jax.random.key_data(laws.answer_keys(key, 2, ids, G)))
    assert (keys[0] == keys[2]).all() and (keys == np.asarray(jax.random.key_data(laws.answer_keys(key, 2, ids, 2 * G)))[:, :G]).all()
    other = np.asarray(jax.random.key_data(laws.answer_keys(key, 3, ids, G)))
    assert len({tuple(k) for k in np.concatenate([keys[:2], other[:2]]).reshape(-1, keys.shape[-1])}) == 4 * G


def test_constrained_walks_end_in_an_allowed_verdict():
    """Whatever the logits: within the limit, parsed, and with an outcome that the prompt allows; under two limits, one the tightest."""
    automaton = materials().automaton
    node_of_id_PK = np.full((3, len(automaton.ids)), -1)
    node_of_id_PK[0, [0, 1, 6]] = 1
    node_of_id_PK[1, 12] = 1  # the last prompt shows no id: none or a free name
    outcome_PJ, modality_P = np.array(answers.outcome_mask(automaton, node_of_id_PK)), np.array([TEXT, TEXT_IMAGE, IMAGE])
    outcome_PJ[0, -2:] = False  # and the first may only name an id, which chance alone would not spell
    shortest = int(np.where(outcome_PJ, automaton.distance_AJ[automaton.start_M[modality_P]], answers.NEVER).min(axis=1).max())
    blocked_V = never_sampled(materials().tokenizer, len(automaton.stop_V))
    samples, distance_PA = 64, answers.distances(automaton, jnp.asarray(outcome_PJ))

    @jax.jit
    def walk(law: Law):
        keys = laws.answer_keys(jax.random.key(0), 0, jnp.arange(3, dtype=jnp.uint32), samples)

        def one(carry, offset):
            state, ended = carry
            logits = 3 * jax.random.normal(jax.random.fold_in(jax.random.key(9), offset), (3, samples, len(blocked_V)))
            logp = laws.log_probs(law, logits, state, offset)
            token = laws.sample(logp, keys, jnp.broadcast_to(offset, state.shape), False, 0, 1.0)
            sane = (logp > -1e29).any(-1) & (jnp.abs(jnp.exp(logp).sum(-1) - 1) < 1e-3)
            after = jnp.where(ended, state, answers.step(automaton, state, token))
            return (after, ended | automaton.stop_V[token]), sane | ended

        start = jnp.broadcast_to(automaton.start_M[modality_P][:, None], (3, samples)).astype(jnp.int32)
        (state, ended), sane = jax.lax.scan(one, (start, jnp.zeros((3, samples), bool)), jnp.arange(law.limit))
        return state, ended, sane

    for limit in (shortest, R):
        state_PG, ended_PG, sane = walk(Law(jnp.asarray(blocked_V), automaton, distance_PA, limit, 1.0, True))
        verdict = jax.tree.map(np.asarray, answers.verdict(automaton, state_PG))
        assert ended_PG.all() and sane.all() and verdict.parsed.all()
        assert np.isin(verdict.kind, [answers.NONE, answers.ID, answers.NAME]).all() and (verdict.kind[0] == answers.ID).all()
        for p in range(3):
            assert set(verdict.id[p]) <= {-1, *np.flatnonzero(node_of_id_PK[p] >= 0)}
        if limit == R:
            assert set(verdict.id[0]) <= {0, 1, 6} and (verdict.kind[2] == answers.NAME).any()
