"""Our own probes: safe, in pairs, alike but for what could mislead; and the gaps between probes and twins."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pgjax.data.sources.benchmarks import BENCHMARKS, read_benchmark
from pgjax.evaluation.probes import probe_gaps
from pgjax.taxonomy import load_taxonomy

EXAMPLES, LEFT_OUT = read_benchmark("probes", Path("no data is needed"), load_taxonomy())
PAIRS = list(zip(EXAMPLES[::2], EXAMPLES[1::2], strict=True))
KINDS = {"identity": 24, "counter_speech": 12, "everyday_words": 14, "safety_education": 10}


def test_probes_are_safe_requests_in_pairs():
    assert not LEFT_OUT and BENCHMARKS["probes"] == ("request",)
    assert {(e.source, e.modality, e.request_label, e.response_label, e.category, e.split) for e in EXAMPLES} == {
        ("probes", "text", "safe", "absent", "none", "eval")
    }
    assert set(Counter(e.group for e in EXAMPLES).values()) == {2} and len({e.id for e in EXAMPLES}) == len(EXAMPLES)
    assert Counter(e.group.split("-")[1] for e in EXAMPLES) == {kind: 2 * pairs for kind, pairs in KINDS.items()}
    assert len({e.request.casefold() for e in EXAMPLES}) == len(EXAMPLES), "no text stands there twice"


def test_the_model_card_has_a_row_for_each_kind():
    card = (Path(__file__).parent.parent / "docs" / "model_card.md").read_text()
    assert all(f"| {kind} | {pairs} |" in card for kind, pairs in KINDS.items()) and f"{len(PAIRS)} mild requests" in card


def test_twins_are_alike():
    for probe, twin in PAIRS:
        assert twin.id == probe.id + "-twin" and probe.group == twin.group == probe.id
        assert abs(len(probe.request) - len(twin.request)) <= 10 and len(probe.request) <= 90
        words = [set(e.request.casefold().split()) for e in (probe, twin)]
        assert len(words[0] & words[1]) >= 0.5 * min(map(len, words)), probe.request
        assert probe.request[-1] == twin.request[-1] and probe.request.isprintable() and probe.request.isascii()


def test_gaps_by_hand():
    flagged = {e.id: e.id in ("probes-identity-01", "probes-identity-02", "probes-identity-02-twin") for e in EXAMPLES}
    found = probe_gaps(flagged)
    assert {kind: part["pairs"] for kind, part in found.items()} == KINDS | {"all": 60}
    identity = found["identity"]
    assert [identity[name]["value"] for name in ("fpr", "twin_fpr", "gap")] == pytest.approx([2 / 24, 1 / 24, 1 / 24])
    assert found["all"]["gap"]["value"] == pytest.approx(1 / 60) and found["everyday_words"]["fpr"] == {"value": 0, "low": 0, "high": 0}
    assert found == probe_gaps(flagged), "drawn alike each time"
    del flagged["probes-identity-01-twin"]
    assert probe_gaps(flagged)["identity"]["pairs"] == 23
    assert probe_gaps({}) == {}


def test_intervals_are_those_of_drawn_pairs():
    rng = np.random.default_rng(3)
    flagged = {e.id: bool(rng.random() < 0.4) for e in EXAMPLES}
    gap = probe_gaps(flagged)["all"]["gap"]
    pairs = [(flagged[probe.id], flagged[twin.id]) for probe, twin in PAIRS]
    drawn = [np.mean([int(a) - int(b) for a, b in (pairs[i] for i in rng.integers(0, 60, 60))]) for _ in range(4000)]
    assert [gap["low"], gap["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.04)
