"""Label scores: each label string scored alone gives the same, and answers without the line have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipe import P, R, batch, host_params, materials, params, setup

from pgjax.conversation import answer_text
from pgjax.generate.labels import answer_scorer, label_prefixes, label_probabilities
from pgjax.generate.law import Law
from pgjax.tokenizer import never_sampled

MODEL, TOKENIZER = setup().model, materials().tokenizer
LAW = Law(jnp.asarray(never_sampled(TOKENIZER, MODEL.config.text.vocab)), materials().automaton, None, R)
TEXTS = [
    answer_text("safe", "safe", None, "a cake", "text", "think"),
    answer_text("unsafe", "safe", "C1S1", "a spear", "text", "think"),
    answer_text("unsafe", "safe", "C2", "", "image", "think"),  # no response line
    "",
    "<think>nothing more",
    "<answer>\nRequest:perhaps\nResponse:",  # out of format, and yet it has both lines
    "<think>\ufffd" * R + "</think>\n<answer>\nRequest:safe\nResponse:safe\nCategory:None\n</answer>",  # too long
    answer_text("safe", "unsafe", "poor taste", "<|image_pad|>", "text", "think"),  # a token that is never sampled, spelled out
]
assert len(TEXTS) == P


def test_prefixes_by_hand():
    text = "<think>x</think>\n<answer>\nRequest:safe\nResponse:unsafe\nCategory:C1\n</answer>"
    start = "<think>x</think>\n<answer>\nRequest:"
    assert label_prefixes(text, "Request") == (start + "safe", start + "unsafe")
    start += "safe\nResponse:"
    assert label_prefixes(text, "Response") == (start + "safe", start + "unsafe")


def test_the_last_answer_counts_and_a_missing_line_is_none():
    think = "<think><answer>\nRequest:safe\nResponse:safe\n</think>\n"
    real = "<answer>\r\nRequest:"
    assert label_prefixes(think + real + "unsafe\r\nCategory:<answer>\n</answer>", "Request") == (
        think + real + "safe",
        think + real + "unsafe",
    )
    assert label_prefixes("<answer>\nRequest:safe\nCategory:None\n</answer>", "Response") is None
    assert label_prefixes("Request:safe\nResponse:safe", "Request") is None


def alone(line: str) -> np.ndarray:
    """Each closed answer scored as the only one to its prompt, all of its tokens summed; NaN where there is none that fits."""
    one = answer_scorer(MODEL, LAW, setup().mesh)
    logp_2P = np.full((2, P), np.nan)
    for label in range(2):
        tokens_PGR, length_PG = np.zeros((P, 1, R), np.int32), np.zeros((P, 1), np.int32)
        for p, text in enumerate(TEXTS):
            pair = label_prefixes(text, line)
            ids = TOKENIZER(pair[label], add_special_tokens=False)["input_ids"] if pair else []
            if 0 < len(ids) <= R:
                tokens_PGR[p, 0, : len(ids)], length_PG[p, 0] = ids, len(ids)
        total_P = one(host_params(), batch()[0], tokens_PGR, length_PG).astype(np.float64).sum(1)
        logp_2P[label] = np.where(length_PG[:, 0] > 0, total_P, np.nan)
    safe_P, unsafe_P = logp_2P
    return 1 / (1 + np.exp(safe_P - unsafe_P))


@pytest.mark.parametrize(("line", "have"), [("Request", [0, 1, 2, 5, 7]), ("Response", [0, 1, 5, 7])])
def test_equal_to_each_answer_alone(line, have):
    scorer = answer_scorer(MODEL, LAW, setup().mesh)
    got = label_probabilities(scorer, host_params(), batch()[0], TEXTS, TOKENIZER, R)[line]
    assert np.flatnonzero(~np.isnan(got)).tolist() == have
    comparable = [p for p in have if p != 7]  # the never-sampled token leaves no sum to compare with
    np.testing.assert_allclose(got[comparable], alone(line)[comparable], atol=1e-5)
    assert np.ptp(got[have]) > 1e-3 and (got[have] > 0).all() and (got[have] < 1).all()


def test_a_mesh_changes_nothing():
    """Rows sharded, rows that the mesh does not divide, and rows on one device."""
    mesh = (2, 2, 2)
    sharded = answer_scorer(MODEL, LAW, setup(mesh).mesh)
    whole = label_probabilities(answer_scorer(MODEL, LAW, setup().mesh), host_params(), batch()[0], TEXTS, TOKENIZER, R)["Request"]
    got = label_probabilities(sharded, params(mesh), batch()[0], TEXTS, TOKENIZER, R)["Request"]
    np.testing.assert_allclose(got, whole, atol=1e-5)
    first = jax.tree.map(lambda x: x[1:2], batch()[0])
    got = label_probabilities(sharded, params(mesh), first, TEXTS[1:2], TOKENIZER, R)["Request"]
    np.testing.assert_allclose(got, whole[1:2], atol=1e-5)


def test_a_constrained_law_is_refused():
    with pytest.raises(ValueError, match="unconstrained"):
        answer_scorer(MODEL, LAW.replace(constrained=True), setup().mesh)
