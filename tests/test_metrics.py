"""Scores against numbers worked out by hand."""

import numpy as np
import pytest

from pgjax.automaton import EMPTY, ID, NAME, NONE, UNLISTED, Verdict
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
    Gold,
)
from pgjax.evaluation.metrics import binary, mean_similarity, summarise

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


def arrays(rows):
    modality, request, response, category, node, never, weight, *verdict = (np.array(x) for x in zip(*rows, strict=True))
    accepted = np.zeros((len(rows), 4), bool)
    accepted[np.flatnonzero(node >= 0), node[node >= 0]] = True
    gold = Gold(
        modality_P=modality,
        request_P=request,
        response_P=response,
        category_P=category,
        node_P=node,
        node_of_id_PK=np.array([NODE_OF_ID] * len(rows)),
        accepted_PN=accepted,
        never_seen_P=never.astype(bool),
        weight_P=weight.astype(np.float32),
    )
    parsed, *codes, similarity = verdict
    return Verdict(parsed.astype(bool), *codes), gold, similarity


def test_summary_by_hand():
    got = summarise(*arrays(ROWS))
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
    got = summarise(*arrays(ROWS))
    assert (got["n_text"], got["n_text_image"], got["n_image"]) == (5, 3, 3)
    assert got["parse_failures_text_image"] == 1 and got["request_recall_text_image"] == 2 / 3
    assert "request_fpr_text_image" not in got and "response_f1_image" not in got and "ood_f1_image" not in got
    assert got["category_accuracy_text"] == 0.5 and got["category_accuracy_image"] == 0
    only_text = summarise(*arrays(ROWS[:5]))
    assert "n_image" not in only_text and only_text["request_f1"] == got["request_f1_text"]


def test_other_accepted_nodes_are_right():
    verdict, gold, similarity = arrays(ROWS[1:2])
    assert summarise(verdict, gold)["category_accuracy"] == 0
    gold.accepted_PN[0, 2] = True
    got = summarise(verdict, gold, similarity)
    assert got["category_accuracy"] == 1 and "naming" not in got


def test_parse_failures_are_never_better_than_an_answer():
    verdict, gold, similarity = arrays(ROWS)
    verdict = verdict.replace(parsed=np.zeros(len(ROWS), bool))
    got = summarise(verdict, gold, similarity)
    zero = ("request_accuracy", "request_f1", "response_accuracy", "category_accuracy", "ood_f1", "ood_accuracy", "naming")
    assert all(got[name] == 0 for name in zero) and got["request_fpr"] == 1 and got["parse_failures"] == got["n"]


def test_all_unsafe_set_is_recall_in_disguise():
    predicted = np.arange(100) > 0
    got = binary(np.ones(100, bool), predicted)
    assert got["recall"] == 0.99 and round(100 * got["weighted_f1"], 2) == 99.5 and "fpr" not in got
    assert got["f1"] == pytest.approx(2 * 0.99 / 1.99)


def test_all_safe_set_has_no_f1_and_empty_sets_nothing():
    got = binary(np.zeros(4, bool), np.array([True, False, False, False]))
    assert got["fpr"] == 0.25 and got["accuracy"] == 0.75 and "f1" not in got
    assert binary(np.zeros(0, bool), np.zeros(0, bool)) == {}


def test_mean_similarity():
    similarity = np.array([[0.5, 0.7, 9.0], [1.0, 1.0, 1.0]])
    valid = np.array([[True, True, False], [False, False, False]])
    got = mean_similarity(similarity, valid)
    assert got[0] == pytest.approx(0.6) and np.isnan(got[1])
    verdict, gold, _ = arrays(ROWS[4:6])
    assert summarise(verdict, gold, np.array([0.6, np.nan]))["naming"] == 0.6


def test_shapes_must_agree():
    verdict, gold, _ = arrays(ROWS)
    with pytest.raises(ValueError, match="one answer a row"):
        summarise(verdict.replace(parsed=verdict.parsed[:, None]), gold)
