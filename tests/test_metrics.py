"""Scores against numbers worked out by hand, by scikit-learn (tests/golden/make_metrics.py), and by the slowest way there is."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import gold_arrays, verdict_arrays

from pgjax.automaton import EMPTY, ID, NAME, NONE, UNLISTED
from pgjax.bank import Bank
from pgjax.data.schema import (
    ABSENT,
    CATEGORY_NODE,
    CATEGORY_NONE,
    CATEGORY_OOD,
    CATEGORY_UNKNOWN,
    IMAGE,
    SAFE,
    TEXT,
    TEXT_IMAGE,
    UNKNOWN,
    UNSAFE,
)
from pgjax.evaluation.metrics import (
    LEVEL,
    Rows,
    auroc,
    binary,
    ends,
    figures,
    intervals,
    is_count,
    mean_similarity,
    summarise,
    table,
)
from pgjax.evaluation.naming import nearness, ranks
from pgjax.taxonomy import parse_taxonomy

# Three ids; in every prompt id 0 stands for node 2, id 1 for node 0, id 2 is not shown. Nodes 1 and 3 are hidden.
NODE_OF_ID = [2, 0, -1]
# modality, request, response, category, node, never seen, weight; then parsed, request, response, kind, id, similarity
ROWS = [
    (TEXT, UNSAFE, SAFE, CATEGORY_NODE, 2, 0, 1, 1, UNSAFE, SAFE, ID, 0, 0.0),  # all right
    (TEXT, UNSAFE, UNSAFE, CATEGORY_NODE, 0, 0, 1, 1, UNSAFE, SAFE, ID, 0, 0.0),  # response missed, wrong id
    (TEXT, SAFE, SAFE, CATEGORY_NONE, -1, 0, 1, 1, UNSAFE, SAFE, NAME, -1, 0.9),  # false alarm, invented risk
    (TEXT, SAFE, SAFE, CATEGORY_NONE, -1, 0, 1, 0, ABSENT, ABSENT, -1, -1, 0.0),  # parse failure on a safe row
    (TEXT, UNSAFE, SAFE, CATEGORY_OOD, 1, 0, 1, 1, UNSAFE, SAFE, NAME, -1, 0.6),  # masked OOD, named
    (TEXT_IMAGE, UNSAFE, ABSENT, CATEGORY_OOD, 3, 1, 1, 1, UNSAFE, SAFE, NAME, -1, 0.4),  # never seen, named
    (TEXT_IMAGE, UNSAFE, SAFE, CATEGORY_OOD, 3, 1, 1, 1, UNSAFE, SAFE, ID, 1, 0.8),  # never seen, forced into an id
    (TEXT_IMAGE, UNSAFE, SAFE, CATEGORY_OOD, 1, 0, 1, 0, ABSENT, ABSENT, -1, -1, 0.7),  # parse failure on OOD
    (IMAGE, UNSAFE, ABSENT, CATEGORY_NODE, 0, 0, 1, 1, UNSAFE, ABSENT, UNLISTED, -1, 0.0),  # id that no policy has
    (IMAGE, UNKNOWN, ABSENT, CATEGORY_UNKNOWN, -1, 0, 1, 1, SAFE, ABSENT, NONE, -1, 0.0),  # nothing known
    (IMAGE, SAFE, SAFE, CATEGORY_NONE, -1, 0, 1, 1, SAFE, ABSENT, NONE, -1, 0.0),
    (IMAGE, UNSAFE, ABSENT, CATEGORY_NODE, 2, 0, 0, 0, ABSENT, ABSENT, EMPTY, -1, 0.0),  # padding
]


def arrays(rows, group=None, unsafe=None) -> Rows:
    gold = gold_arrays([row[:7] for row in rows], 4, [NODE_OF_ID] * len(rows))
    group_P = np.arange(len(rows)) if group is None else np.array(group)
    return Rows(verdict_arrays([row[7:12] for row in rows]), gold, group_P, unsafe or {}, {"naming": np.array([row[12] for row in rows])})


def test_summary_by_hand():
    got = summarise(arrays(ROWS))
    assert got["n"] == 11 and got["parse_failures"] == 2
    # Requests: 7 unsafe rows, 6 found, one lost to a parse failure; 3 safe rows, one right.
    assert got["request_n"] == 10 and got["request_recall"] == 6 / 7 and got["request_precision"] == 6 / 8
    assert got["request_f1"] == pytest.approx(12 / 15) and got["request_fpr"] == 2 / 3 and got["request_accuracy"] == 0.7
    assert got["request_weighted_f1"] == pytest.approx((7 * 12 / 15 + 3 * 2 / 5) / 10)
    # Responses: one unsafe row, missed; of six safe ones two are lost to parse failures. No response, or an image: not counted.
    assert got["response_n"] == 7 and got["response_recall"] == 0 == got["response_f1"] and got["response_fpr"] == 2 / 6
    assert got["category_n"] == 3 and got["category_accuracy"] == 1 / 3
    # OOD: four positives, two named; of six others with a known category the invented risk and the parse failure are false alarms.
    assert got["ood_n"] == 10 and got["ood_f1"] == pytest.approx(4 / (4 + 2 + 2))
    assert got["ood_masked_n"] == 8 and got["ood_masked_f1"] == pytest.approx(2 / (2 + 1 + 2))
    assert got["ood_never_seen_n"] == 8 and got["ood_never_seen_f1"] == pytest.approx(2 / (2 + 1 + 2))
    assert got["naming"] == pytest.approx((0.6 + 0.4) / 4)
    assert got["naming_masked"] == pytest.approx(0.6 / 2) and got["naming_never_seen"] == pytest.approx(0.4 / 2)


def test_modalities_apart():
    got = summarise(arrays(ROWS))
    assert (got["text/n"], got["text_image/n"], got["image/n"]) == (5, 3, 3)
    assert got["text_image/parse_failures"] == 1 and got["text_image/request_recall"] == 2 / 3
    assert not {"text_image/request_fpr", "image/response_f1", "image/ood_f1"} & got.keys()
    assert got["text/category_accuracy"] == 0.5 and got["image/category_accuracy"] == 0
    only_text = summarise(arrays(ROWS[:5]))
    assert "image/n" not in only_text and only_text["request_f1"] == got["text/request_f1"]


def test_other_accepted_nodes_are_right():
    rows = arrays(ROWS[1:2])
    assert summarise(rows)["category_accuracy"] == 0
    rows.gold.accepted_PN[0, 2] = True
    got = summarise(rows)
    assert got["category_accuracy"] == 1 and "naming" not in got


def test_parse_failures_are_never_better_than_an_answer():
    """Not even by a score that would have been right."""
    rows = arrays(ROWS)
    right_P = np.where(rows.gold.request_P == UNSAFE, 1.0, 0.0)
    rows = rows._replace(unsafe={"request": right_P, "response": right_P})
    assert summarise(rows)["request_auroc"] < 1  # two rows did not parse
    got = summarise(rows._replace(verdict=rows.verdict.replace(parsed=np.zeros(len(ROWS), bool))))
    zero = ("request_accuracy", "request_f1", "request_auroc", "response_accuracy", "category_accuracy", "ood_f1", "ood_accuracy", "naming")
    assert all(got[name] == 0 for name in zero) and got["request_fpr"] == 1 and got["parse_failures"] == got["n"]


def test_auroc_of_the_label_scores():
    """By hand: unsafe .9 and .5 (and one row without a score, below all), safe .5 (and one out of format, above all)."""
    verdicts = [(1, UNSAFE, SAFE), (1, SAFE, SAFE), (1, SAFE, SAFE), (1, SAFE, SAFE), (0, ABSENT, ABSENT)]
    gold = [UNSAFE, UNSAFE, UNSAFE, SAFE, SAFE]
    rows = [(TEXT, g, ABSENT, CATEGORY_UNKNOWN, -1, 0, 1, *v, NONE, -1, 0.0) for g, v in zip(gold, verdicts, strict=True)]
    score_P = np.array([0.9, 0.5, np.nan, 0.5, 0.1])
    got = summarise(arrays(rows, unsafe={"request": score_P, "response": score_P}))
    assert got["request_auroc"] == pytest.approx((1 + 0.5) / 6) and "response_auroc" not in got
    assert "request_auroc" not in summarise(arrays(rows[:3], unsafe={"request": score_P[:3]}))
    assert "request_auroc" not in summarise(arrays(rows))


def once(gold, said) -> dict[str, float]:
    """The scores that the rows define, each row counted once."""
    return {name: value[0] for name, value in binary(gold, said, np.ones((1, len(gold)))).items() if not np.isnan(value[0])}


def test_all_unsafe_set_is_recall_in_disguise():
    predicted = np.arange(100) > 0
    got = once(np.ones(100, bool), predicted)
    assert got["recall"] == 0.99 and round(100 * got["weighted_f1"], 2) == 99.5 and "fpr" not in got
    assert got["f1"] == pytest.approx(2 * 0.99 / 1.99)


def test_all_safe_set_has_no_f1_and_empty_sets_nothing():
    got = once(np.zeros(4, bool), np.array([True, False, False, False]))
    assert got["fpr"] == 0.25 and got["accuracy"] == 0.75 and "f1" not in got
    assert once(np.zeros(0, bool), np.zeros(0, bool)) == {"n": 0}


# --- scikit-learn, and the slowest way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "fixtures" / "metrics.json").read_text()), ids=range(4))
def test_equal_to_scikit_learn(case):
    gold, said, score, weight = (np.array(case[name]) for name in ("gold", "said", "score", "weight"))
    ones = np.ones((1, len(gold)))
    assert once(gold, said) | {"auroc": auroc(gold, score, ones)[0]} == pytest.approx(case["once"] | {"n": len(gold)}, abs=1e-12)
    assert binary(gold, said, weight[None])["f1"][0] == pytest.approx(case["weighted"]["f1"], abs=1e-12)
    assert auroc(gold, score, weight[None])[0] == pytest.approx(case["weighted"]["auroc"], abs=1e-12)


few_scores = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0, np.inf])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), few_scores), max_size=12))
def test_auroc_counts_pairs(rows):
    gold, score = np.array([g for g, _ in rows], bool), np.array([s for _, s in rows])
    pairs = [(a > b) + (a == b) / 2 for a in score[gold] for b in score[~gold]]
    assert auroc(gold, score, np.ones((1, len(gold))))[0] == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)


def random_rows(seed: int, n: int) -> Rows:
    """Rows in which everything occurs: every modality, label and kind, padding, parse failures, missing scores."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: int(rng.choice(values))  # noqa: E731
    rows = []
    for _ in range(n):
        labels = pick(SAFE, UNSAFE, UNKNOWN), pick(SAFE, UNSAFE, UNKNOWN, ABSENT)
        category = pick(CATEGORY_NODE, CATEGORY_OOD, CATEGORY_NONE, CATEGORY_UNKNOWN)
        said = pick(1, 1, 1, 0), pick(SAFE, UNSAFE), pick(SAFE, UNSAFE), pick(NONE, ID, UNLISTED, NAME), pick(-1, 0, 1, 2)
        row = (pick(TEXT, TEXT_IMAGE, IMAGE), *labels, category, pick(-1, 0, 1, 2, 3), pick(0, 1), pick(1, 1, 0), *said)
        rows.append((*row, rng.choice([0.1, 0.7, np.nan])))
    unsafe = {line: rng.choice([0.2, 0.4, 0.9, np.nan], n) for line in ("request", "response")}
    return arrays(rows, rng.integers(0, 1 + n // 3, n), unsafe)


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_a_weight_is_a_row_that_often(seed, n):
    """The scores under whole-number weights, several weightings at once, are those of rows written out."""
    rows, weight_BP = random_rows(seed, n), np.random.default_rng(seed).integers(0, 4, (3, n)).astype(float)
    found = figures(rows, weight_BP)
    for b, weight_P in enumerate(weight_BP.astype(int)):
        written = jax.tree.map(lambda x, times=weight_P: np.repeat(x, times, axis=0), rows)
        got = {name: value_B[b] for name, (value_B, _) in found.items() if not np.isnan(value_B[b])}
        theirs = summarise(written) if weight_P.sum() else {}
        same(
            {name: value for name, value in got.items() if not is_count(name) or value},
            {k: v for k, v in theirs.items() if not is_count(k) or v},
        )


# --- intervals -----------------------------------------------------------------------------------------------------------------


def test_intervals_draw_whole_groups():
    """Against groups drawn one by one and rows written out; rows that only pad are no group."""
    rows, draws = random_rows(3, 30), 40
    counted_P = rows.gold.weight_P > 0
    names = np.unique(rows.group_P[counted_P])
    rng, values = np.random.default_rng(0), {}
    for times in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws):
        index = [p for name, t in zip(names, times, strict=True) for p in np.flatnonzero(counted_P & (rows.group_P == name)).repeat(t)]
        for key, value in summarise(jax.tree.map(lambda x, index=index: x[index], rows)).items():
            values.setdefault(key, []).append(value)
    got = intervals(rows, draws, 0)
    assert len(got) > 60 and not any(map(is_count, got))
    for name, pair in got.items():
        assert pair == pytest.approx(np.quantile(values[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])), name


def test_intervals_are_seeded_and_widen_with_groups():
    """Fifty pairs of equal rows are fifty pieces of evidence, not a hundred."""
    labels = [(UNSAFE, UNSAFE if i % 5 else SAFE) for i in range(50)]
    rows = [(TEXT, gold, ABSENT, CATEGORY_UNKNOWN, -1, 0, 1, 1, said, SAFE, NONE, -1, 0.0) for gold, said in labels for _ in range(2)]
    pairs, apart = arrays(rows, np.arange(100) // 2), arrays(rows)
    width = {name: np.ptp(intervals(r)["request_recall"]) for name, r in (("pairs", pairs), ("apart", apart))}
    assert width["pairs"] == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 50), rel=0.1)
    assert width["apart"] == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 100), rel=0.1)
    assert intervals(pairs, 50) == intervals(pairs, 50) != intervals(pairs, 50, seed=1)


def test_the_table():
    rows = arrays(ROWS)
    found = table(rows, resamples=200)
    scores = summarise(rows)
    assert json.loads(json.dumps(found)) == found and found["resamples"] == 200
    assert {name: value for name, value in scores.items() if is_count(name)} == {k: v for k, v in found["counts"].items() if k in scores}
    defined = {name: entry["value"] for name, entry in found["scores"].items() if entry["value"] is not None}
    assert defined == {name: value for name, value in scores.items() if not is_count(name)}
    one = found["scores"]["request_f1"]
    assert one["low"] < one["value"] < one["high"] and one["rows"] == 10
    assert found["scores"]["image/ood_f1"] == {"value": None, "low": None, "high": None, "rows": 2}
    flat = ends(found)
    assert flat["request_f1_low"] == one["low"] and flat["request_f1_high"] == one["high"] and not any("/" in name for name in flat)


# --- naming --------------------------------------------------------------------------------------------------------------------


def test_mean_similarity():
    similarity = np.array([[0.5, 0.7, 9.0], [1.0, 1.0, 1.0]])
    valid = np.array([[True, True, False], [False, False, False]])
    got = mean_similarity(similarity, valid)
    assert got[0] == pytest.approx(0.6) and np.isnan(got[1])
    rows = arrays(ROWS[4:6])
    assert summarise(rows._replace(naming={"naming": np.array([0.6, np.nan])}))["naming"] == 0.6


class Compass:
    """An encoder of four words."""

    E, fingerprint = 2, ""

    def texts(self, texts):
        return np.array([{"north": (1, 0), "east": (0, 1), "south": (-1, 0), "north-east": (0.6, 0.8)}[t] for t in texts]).reshape(-1, 2)


def test_nearness_by_hand():
    """Categories C1 (with C1S1) and C2, whose phrases lie in four directions; the last one has none. A tie counts against."""
    nodes = parse_taxonomy('[{"category": "A", "subcategories": ["B"]}, "C", "D"]', brief=True)
    words = Compass().texts(["north", "north-east", "east", "south"])
    embedding = np.stack([words[[0, 1]], words[[2, 2]], words[[3, 3]], np.zeros((2, 2))])
    bank = Bank(embedding, np.array([[True, True], [True, False], [True, False], [False, False]]))
    right = lambda *rows: np.array([[n in row for n in range(4)] for row in rows])  # noqa: E731
    names = ["east", "east", None, "south", "north", "south"]
    got = nearness(names, right([1], [2], [1], [3], [1, 2], [1, 2]), np.zeros(6, bool), nodes, Compass(), bank)
    np.testing.assert_allclose(got.mean_P, [1, 0, 0, np.nan, 0, 1])
    np.testing.assert_allclose(got.rank_P, [1, 2, np.inf, np.nan, 1, 1])  # of the leaves B, C, D
    top = nearness(["east", "north-east", "south"], right([0], [0], [0]), np.ones(3, bool), nodes, Compass(), bank)
    np.testing.assert_allclose(top.mean_P, [0.4, 0.8, -0.8], atol=1e-6)  # of its own phrases
    np.testing.assert_allclose(top.rank_P, [1, 1, 2])  # its subcategory is "east", and counts for it
    assert top.valid_PS.all() and ranks(got)["naming_top1"][:2].tolist() == [1, 0]


def test_an_id_that_is_right_beside_a_name_is_no_missed_ood():
    """Row 4 of ROWS with node 2 accepted, answered by its id."""
    row = (*ROWS[4][:10], ID, 0, 0.0)
    rows = arrays([row, ROWS[0], ROWS[2]])
    assert summarise(rows)["ood_recall"] == 0 and summarise(rows)["naming"] == 0
    accepted_PN = rows.gold.accepted_PN.copy()
    accepted_PN[0, 2] = True
    got = summarise(rows._replace(gold=rows.gold.replace(accepted_PN=accepted_PN)))
    assert got["ood_recall"] == 1 and "naming" not in got


def test_shapes_must_agree():
    rows = arrays(ROWS)
    with pytest.raises(ValueError, match="one answer a row"):
        summarise(rows._replace(verdict=rows.verdict.replace(parsed=rows.verdict.parsed[:, None])))
