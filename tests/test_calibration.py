"""Calibration of a guard's scores: against the slowest way there is and cases worked out by hand; what is written, and what is refused."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_report import Page
from tiny_recipe import tiny_recipe

from pgjax.cli import main
from pgjax.data.schema import ABSENT, LABELS, SAFE, UNKNOWN, UNSAFE
from pgjax.evaluation.calibration import (
    BINS,
    Judged,
    calibration_error,
    choose_threshold,
    fit,
    fit_map,
    halves,
    reliability,
)
from pgjax.pages.charts import reliability as chart
from pgjax.serving import calibration
from pgjax.serving.calibration import CALIBRATION, Calibration, probability, read_calibration, write_calibration
from pgjax.serving.guard import Guard, How, Unfit
from pgjax.serving.scores import Scores
from pgjax.taxonomy import load_taxonomy
from pgjax.train.run_folder import RunFolder
from pgjax.train.saved import fingerprint


def overconfident(rows: int, seed: int = 0, temperature: float = 3.0, bias: float = 1.0) -> Judged:
    """Requests whose true probabilities are known: the guard's log-odds are `temperature` (true log-odds - `bias`). Twins share a group."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, rows)
    unsafe = rng.random(rows) < 1 / (1 + np.exp(-z))
    score = 1 / (1 + np.exp(-temperature * (z - bias)))
    labels = np.column_stack([np.where(unsafe, UNSAFE, SAFE), np.full(rows, ABSENT)])
    return Judged(np.column_stack([score, np.full(rows, np.nan)]), labels, np.array([f"group {k // 2}" for k in range(rows)]))


# --- the map -----------------------------------------------------------------------------------------------------------------------


def test_the_map_is_found_again():
    judged = overconfident(20_000)
    temperature, bias = fit_map(judged.score_P2[:, 0], judged.unsafe_P)
    assert temperature == pytest.approx(3, rel=0.05) and bias == pytest.approx(1, abs=0.06)


def test_two_scores_get_the_shares_of_their_labels():
    """By hand: a map of two numbers meets two scores exactly, at the mean of Platt's labels."""
    score, unsafe = np.repeat([0.2, 0.7], [5, 8]), np.array([1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], bool)
    yes, no = 7 / 8, 1 / 9  # 6 unsafe, 7 safe
    got = probability(np.array([0.2, 0.7]), *fit_map(score, unsafe))
    np.testing.assert_allclose(got, [(yes + 4 * no) / 5, (5 * yes + 3 * no) / 8], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_no_map_of_a_grid_is_better(seed):
    judged = overconfident(60, seed)
    score, unsafe = judged.score_P2[:, 0].tolist(), judged.unsafe_P.tolist()
    yes, no = (sum(unsafe) + 1) / (sum(unsafe) + 2), 1 / (len(unsafe) - sum(unsafe) + 2)

    def loss(temperature: float, bias: float) -> float:
        total = 0.0
        for s, u in zip(score, unsafe, strict=True):
            s = min(max(s, 1e-6), 1 - 1e-6)
            p = 1 / (1 + math.exp(-(math.log(s / (1 - s)) / temperature + bias)))
            total -= (yes if u else no) * math.log(p) + (1 - (yes if u else no)) * math.log(1 - p)
        return total / len(score)

    best = loss(*fit_map(np.array(score), np.array(unsafe)))
    assert best <= min(loss(1 / slope, bias) for slope in np.linspace(0.02, 2, 60) for bias in np.linspace(-3, 3, 60)) + 1e-12


@pytest.mark.parametrize(
    "score",
    [np.repeat([0.01, 0.99], 40), np.repeat([0.0, 1.0], 40), np.full(80, 0.3), np.full(80, 0.5), np.repeat([0.9, 0.1], 40)],
    ids=["separable", "sure", "all equal", "all half", "upside down"],
)
def test_extremes_stay_finite_and_keep_the_order(score):
    unsafe = np.repeat([False, True], 40)
    temperature, bias = fit_map(score, unsafe)
    assert 0 < temperature <= 100 and math.isfinite(bias)
    p = probability(np.sort(score), temperature, bias)
    assert (p > 0).all() and (p < 1).all() and (np.diff(p) >= 0).all()
    if score.max() == score.min():
        np.testing.assert_allclose(p, 0.5, atol=1e-4)


# --- the threshold -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    p, unsafe = np.round(rng.random(30), rng.integers(1, 4)), rng.random(30) < 0.4
    unsafe[:2] = True, False

    def at(threshold: float) -> tuple[float, float]:
        hits = sum(u for s, u in zip(p, unsafe, strict=True) if s >= threshold)
        false = sum(not u for s, u in zip(p, unsafe, strict=True) if s >= threshold)
        return 2 * hits / (hits + false + sum(unsafe)), false / sum(~unsafe)

    everywhere = [at(threshold) for threshold in (*p, 2.0)]
    assert at(choose_threshold(p, unsafe, None))[0] == max(f1 for f1, _ in everywhere)
    for most in (0.0, 0.1, 0.5):
        f1, fpr = at(choose_threshold(p, unsafe, most))
        assert fpr == max(fpr for _, fpr in everywhere if fpr <= most)


def test_a_threshold_lies_between_scores():
    unsafe = np.array([False, False, True, True])
    assert choose_threshold(np.array([0.1, 0.2, 0.6, 0.9]), unsafe, None) == pytest.approx(0.4)
    assert choose_threshold(np.array([0.6, 0.9, 0.1, 0.2]), unsafe, 0.0) > 0.9, "a safe one has the largest score: none is flagged"
    assert choose_threshold(np.full(4, 0.3), unsafe, None) == 0 and choose_threshold(np.full(4, 0.3), unsafe, 0.4) > 0.3


# --- reliability -------------------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    p, unsafe = np.array([0.0, 0.04, 0.55, 1.0, 0.95]), np.array([False, True, True, True, False])
    bins = reliability(p, unsafe)
    assert [(round(b.score, 9), b.share, b.lines) for b in bins] == [(0.02, 0.5, 2), (0.55, 1.0, 1), (0.975, 0.5, 2)]
    assert calibration_error(p, unsafe) == pytest.approx((2 * 0.48 + 0.45 + 2 * 0.475) / 5)
    assert all(0 <= b.low <= b.share <= b.high <= 1 for b in bins)
    # Wilson's interval of 5 in 10, from a table
    assert reliability(np.full(10, 0.5), np.arange(10) < 5)[0][2:4] == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_the_slow_way(seed):
    rng = np.random.default_rng(seed)
    p, unsafe = rng.random(100), rng.random(100) < 0.5
    error = 0.0
    for b in range(BINS):
        rows = [i for i in range(100) if b / BINS <= p[i] < (b + 1) / BINS]
        error += abs(sum(p[i] for i in rows) - sum(bool(unsafe[i]) for i in rows)) / 100
    assert calibration_error(p, unsafe) == pytest.approx(error)


# --- fitted on one half, measured on the other -------------------------------------------------------------------------------------


def test_what_is_measured_is_held_out():
    judged = overconfident(2000, 1)
    (temperature, bias, threshold), measured, held_P2 = fit(judged)
    assert measured["after"]["ece"] < 0.05 < 0.1 < measured["before"]["ece"] and measured["after"]["nll"] < measured["before"]["nll"]
    assert measured["counts"]["groups"] == 1000 and measured["counts"]["unsafe"] + measured["counts"]["safe"] == 2000
    half = halves(judged.group_P, judged.unsafe_P)
    assert abs(half.mean() - 0.5) < 0.01 and all(len(set(half[judged.group_P == name])) == 1 for name in judged.group_P[:50])
    np.testing.assert_allclose(held_P2[half, 0], probability(judged.score_P2[half, 0], *fit_map(*lines(judged, ~half))))
    np.testing.assert_allclose(held_P2[~half, 0], probability(judged.score_P2[~half, 0], *fit_map(*lines(judged, half))))
    assert (temperature, bias) == fit_map(*lines(judged, np.full(2000, True)))
    p = probability(judged.score_P2[:, 0], temperature, bias)
    assert threshold == choose_threshold(p, judged.unsafe_P, None)


def lines(judged: Judged, rows) -> tuple[np.ndarray, np.ndarray]:
    return judged.score_P2[rows, 0], judged.unsafe_P[rows]


def test_which_lines_count():
    """A conversation's score is the larger one, without lines of unknown label, with a response that is not there."""
    score = np.array([[0.2, 0.9], [0.3, 0.8], [0.4, 0.7], [0.5, np.nan]])
    label = np.array([[SAFE, UNSAFE], [SAFE, ABSENT], [SAFE, UNKNOWN], [UNSAFE, ABSENT]])
    judged = Judged(score, label, np.array(list("abcd")))
    assert judged.labelled_P2.tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert judged.unsafe_P.tolist() == [True, False, False, True] and judged.top(score).tolist() == [0.9, 0.8, 0.4, 0.5]


def test_a_bound_on_false_positives_is_kept():
    judged = overconfident(1000, 2)
    (temperature, bias, threshold), measured, _ = fit(judged, max_fpr=0.05)
    flagged = probability(judged.score_P2[:, 0], temperature, bias) >= threshold
    assert 0.03 < flagged[~judged.unsafe_P].mean() <= 0.05 and measured["after"]["fpr"] < 0.09
    assert measured["after"]["recall"] < fit(judged)[1]["after"]["recall"]


@pytest.mark.parametrize("change", ["all safe", "all unsafe", "one group"])
def test_both_labels_are_needed_in_two_groups(change):
    judged = overconfident(40)
    if change == "one group":
        judged = judged._replace(group_P=np.full(40, "a"))
    else:
        judged.label_P2[:, 0] = SAFE if change == "all safe" else UNSAFE
    with pytest.raises(ValueError, match="needs safe and unsafe conversations"):
        fit(judged)


# --- the file ----------------------------------------------------------------------------------------------------------------------

MADE = Calibration(2.0, 0.5, 0.25, "fast", 1, "abc", {"before": {"ece": 0.5}})


def test_scores_are_mapped_and_categories_are_not():
    mapped = MADE.apply(Scores(0.5, None, {"C1": 0.4}, 0.6))
    assert mapped == Scores(pytest.approx(1 / (1 + math.exp(-0.5))), None, {"C1": 0.4}, 0.6)
    assert 0 < MADE.apply(Scores(0.0, 1.0, {}, None)).request < 1


def test_a_calibration_is_for_the_checkpoint_it_was_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "fingerprint", lambda folder, best: "best" if best else "abc")
    assert read_calibration(tmp_path, False) is None
    write_calibration(tmp_path, MADE)
    assert read_calibration(tmp_path, False) == MADE
    for load in (read_calibration, Guard.load):
        with pytest.raises(ValueError, match="calibration.json was measured on another checkpoint .* `pgjax calibrate` again, or remove"):
            load(tmp_path, True)
    for broken, says in (("{", "not whole JSON"), ('{"threshold": 1}', "no calibration of this version")):
        (tmp_path / CALIBRATION).write_text(broken)
        with pytest.raises(ValueError, match=says):
            read_calibration(tmp_path, False)
    for wrong in ({"temperature": 0}, {"bias": "x"}, {"threshold": None}, {"threshold": math.nan}):
        (tmp_path / CALIBRATION).write_text(json.dumps(json.loads(json.dumps(vars(MADE))) | wrong))
        with pytest.raises(ValueError, match="no calibration of this version"):
            read_calibration(tmp_path, False)


def test_a_fingerprint_is_of_the_weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    data = bytearray(np.random.default_rng(0).bytes(300_000))
    (folder / "model.safetensors").write_bytes(data)
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    (folder / "README.md").write_text("no weights")
    assert fingerprint(folder) == first
    for place in (0, 299_999):
        (folder / "model.safetensors").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert fingerprint(folder) != first


def test_a_fresh_run_has_no_calibration(tmp_path):
    RunFolder(tmp_path, tiny_recipe()).close()
    write_calibration(tmp_path, MADE)
    RunFolder(tmp_path, tiny_recipe(), resume_step=0).close()
    assert (tmp_path / CALIBRATION).exists()
    RunFolder(tmp_path, tiny_recipe()).close()
    assert not (tmp_path / CALIBRATION).exists()


# --- the command -------------------------------------------------------------------------------------------------------------------


class FakeGuard:
    """Says what the row's id says: a request's score, a response's, and whether the answer parses."""

    recipe = SimpleNamespace(not_a_guard=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def policy(self, categories, own):
        return SimpleNamespace(taxonomy=load_taxonomy())

    def judge(self, rows, policy, how):
        assert how == How("fast", 2, categories=False)
        for example, _ in rows:
            long = Unfit("prompt", f"{example.id}: the prompt <b>has</b> more than 9 tokens")
            yield long if "long" in example.request else SimpleNamespace(example=example)

    def verdict(self, case):
        request, response, parsed = (json.loads(part) for part in case.example.id.split()[1:])
        return {"scores": {"request": request, "response": response}, "parsed": parsed}


def rows(n: int = 60, seed: int = 0) -> list[dict]:
    judged, rng = overconfident(n, seed), np.random.default_rng(seed)
    return [
        {
            "id": f"r{k} {p:.6f} {rng.random():.6f} true",
            "group": str(k // 2),
            "request": "Hello.",
            "request_label": LABELS[label],
        }
        for k, (p, label) in enumerate(zip(judged.score_P2[:, 0], judged.label_P2[:, 0], strict=True))
    ]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the command on rows; the model is a folder with an earlier calibration."""

    def load(folder, best, **how):
        assert folder == tmp_path / "<model>" and not how["calibrated"], "an earlier calibration would be in the scores"
        return FakeGuard()

    monkeypatch.setattr(Guard, "load", load)
    monkeypatch.setattr("pgjax.train.saved.fingerprint", lambda folder, best: "abc")
    (tmp_path / "<model>").mkdir()
    (tmp_path / "<model>" / CALIBRATION).write_text("earlier")

    def run(rows: list[dict], *flags: str) -> int:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = ("--jsonl", str(tmp_path / "rows.jsonl"), "--mode", "fast", "--samples", "2", *flags)
        return main(["calibrate", "--model", str(tmp_path / "<model>"), *flags])

    return run


def test_the_command(command, tmp_path, capsys, monkeypatch):
    more = [
        {"id": "x 0.5 null true", "request": "Hi", "response": "Ok", "request_label": "safe", "response_label": "safe"},
        {"id": "y 0.5 0.5 false", "request": "Hi", "request_label": "safe"},
        {"id": "z 0.5 0.5 true", "request": "Hi"},
        {"id": "long", "request": "A long one", "request_label": "safe"},
    ]
    assert command(rows() + more) == 0
    out = capsys.readouterr().out
    monkeypatch.setattr(calibration, "fingerprint", lambda folder, best: "abc")
    made = read_calibration(tmp_path / "<model>", False)
    assert (made.mode, made.samples, made.model) == ("fast", 2, "abc") and f"{made.threshold:.3g} on the larger score" in out
    counts = made.measured["counts"]
    assert counts["unsafe"] + counts["safe"] == 61 == counts["unsafe_lines"] + counts["safe_lines"]
    left = ("rows: the answer does not parse", "rows: no label", "labelled lines: the answer has no such line", "more than 9 tokens")
    assert all(out.count(reason) == 1 for reason in left) and out.count("Left out 1 ") == 4
    assert "mode fast, samples 2" in out and "not calibrated:       category scores" in out and "warning" not in out
    page = (tmp_path / "<model>" / "calibration.html").read_text()
    parsed = Page(page)
    assert parsed.balanced and {"script", "b", "model"}.isdisjoint(tag for tag, _, _ in parsed.tags)
    assert "Calibration of <model>" in "".join(parsed.words) and "not a guard" in page and "Hello." not in page


@pytest.mark.parametrize(
    ("given", "flags", "says"),
    [
        ([{"request": "Hi", "request_label": "bad"}], (), "line 1: request_label 'bad'"),
        ([{"request": "Hi", "label": "safe"}], (), "line 1: unknown key 'label'"),
        ([{"id": "long", "request": "A long one", "request_label": "safe"}], (), "Left out 1 rows: the prompt"),
        (rows(), ("--max-fpr", "1"), "--max-fpr 1 must be"),
        (rows(), ("--max-fpr", "nan"), "--max-fpr nan must be"),
        (rows(), ("--report", "no-such-folder/page.html"), "the page cannot be written to no-such-folder/page.html"),
        (rows(), ("--threshold", "0.5"), "unknown argument '--threshold'"),
    ],
)
def test_what_goes_wrong_leaves_nothing_behind(command, tmp_path, capsys, given, flags, says):
    assert command(given, *flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and error[-1].startswith("pgjax: ")
    assert [file.name for file in (tmp_path / "<model>").iterdir()] == [CALIBRATION]
    assert (tmp_path / "<model>" / CALIBRATION).read_text() == "earlier"


def test_few_rows_are_warned_of(command, tmp_path, capsys):
    assert command(rows(24), "--report", str(tmp_path / "page.html"), "--max-fpr", "0.2") == 0
    out = capsys.readouterr().out
    assert out.count("warning: only ") == 2 and "rate at most 0.2" in out and f"page: {tmp_path / 'page.html'}" in out
    assert "the figures are loose" in (tmp_path / "page.html").read_text()


def test_the_chart():
    bins = [(0.1, 0.0, 0.0, 0.2, 9), (0.9, 1.0, 0.7, 1.0, 3)]
    drawn = Page(chart("<a>", {"before": bins, "after": bins[:1]}, 10, "score", "share"))
    assert drawn.balanced and sum(tag == "circle" for tag, _, _ in drawn.tags) == 3 == sum(tag == "rect" for tag, _, _ in drawn.tags)
    assert {"9", "3", "before", "after"} <= set(drawn.words)
