"""docs/results.md from the study's files: intervals, blocks, markers, and that the committed page is what the committed files give."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import study_report  # noqa: E402
import study_scores as scores  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"
P = 40
KIND = ["none", "node", "ood", "never_seen"]
NAMING = ("naming", "naming_second", "naming_mrr", "naming_top1")


def judged(seed: int, learnt: float) -> dict:
    """Rows whose scores know the label in part; two in a group, ids in no order, one answer without a verdict and one without a score."""
    rng = np.random.default_rng(seed)
    unsafe = [k % 2 for k in range(P)]
    score = [learnt * u + x for u, x in zip(unsafe, rng.normal(size=P), strict=True)]
    named = [k for k in range(P) if k % 4 >= 2]
    rows = {"id": [f"set_{'ab'[k % 3 > 0]}-{(7 * k) % P:02}" for k in range(P)], "group": [f"g{k // 2}" for k in range(P)]}
    rows |= {"unsafe": unsafe, "said": [None if k == 3 else int(s > 0) for k, s in enumerate(score)]}
    rows |= {"score": [None if k in (3, 4) else s for k, s in enumerate(score)], "category": [KIND[k % 4] for k in range(P)]}
    rows |= {"category_right": [0] * P, "ood_detected": [int(k % 8 == 2) for k in range(P)], "named_rows": named}
    return rows | {name: rng.random(len(named)).tolist() for name in NAMING}


def by_grpo(seed: int, learnt: float) -> dict:
    before = {name: x for name, x in judged(seed, 0).items() if name in ("said", "score", "category_right", *NAMING)}
    point = {"request_f1": 0.5, "request_auroc": 0.6, "category_accuracy": None, "ood_f1": 0.1, "naming": 0.2}
    curve = [point | {"step": n, "seconds": 2.0 * n, "tokens": 9.0 * n} for n in (0, 4)]
    cost = {"rows": 16, "flops": 1.5e12, "seconds": 12.0, "tokens": 900.0}
    trained = {"reward": [1.0, 1.2, 1.1, 1.4 + seed], "length": [30.0, 31.0, 31.5, 32.25]}
    return {"cost": cost, "curve": curve, "trained": trained, "before": before, "after": judged(seed, learnt)}


def timed(seed: int) -> dict:
    side = lambda pace: {"seconds": [9 + pace * k for k in range(20)], "reward": [0.1 * k for k in range(20)], "first_step_seconds": 9.0}  # noqa: E731
    return {"pgjax": side(1.0), "trl": side(2.0), "settings": {"seed": seed}}


def written(folder: Path, form: str, experiment: str, run: str, seed: int, found: dict) -> dict:
    about = {"experiment": experiment, "run": run, "seed": seed, "form": form, "commit": "abc1234", "date": "2026-01-02"}
    one = about | {"machine": {"cpu": "a processor"}, "seconds": 1.0} | found
    file = folder / form / experiment / f"{run}-{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(one))
    return one


@pytest.fixture
def results(tmp_path):
    """Of the accelerator form, experiments 1, 2 and 4; of the pilot, the clock and the determinism table."""
    plain = lambda seed, learnt: {name: judged(seed, learnt)[name] for name in ("id", "group", "unsafe", "said", "score")}  # noqa: E731
    for seed in (0, 1, 2):
        written(tmp_path, "accelerator", "learning", "grpo", seed, by_grpo(seed, 2))
        written(tmp_path, "accelerator", "data", "in_order", seed, by_grpo(seed + 3, 1))
        written(tmp_path, "accelerator", "naming", "full", seed, by_grpo(seed, 2))
        written(tmp_path, "accelerator", "naming", "one_name", seed, by_grpo(seed + 3, 2))
        written(tmp_path, "pilot", "clock", "toy", seed, timed(seed))
        drawn = {
            str(n): {"after": plain(seed, n), "ece": 0.1 * n, "ece_calibrated": 0.05, "seconds": 2.0 * n, "tokens": 100 * n} for n in (1, 8)
        }
        written(tmp_path, "accelerator", "thinking", "averaged", seed, {"thoughts": drawn})
        asked = {"permuted": {"n": 4, "obeyed": 0.5, "ci": [0.2, 0.8], "unsafe": [4, 4]}}
        written(
            tmp_path, "accelerator", "data", "obedience", seed, {"before": asked | {"permuted": {"n": 0, "obeyed": None}}, "after": asked}
        )
    written(tmp_path, "accelerator", "learning", "words", 0, {"after": plain(9, 1)})
    setting = {"setting": "1 device", "step_1_tokens_equal": True, "steps_tokens_equal": 2, "steps": 2, "answers_equal": 1.0}
    setting |= {f"{name}_difference": 0.0 for name in ("reward", "loss", "grad_norm", "logprob")}
    setting |= {"metrics_bitwise_equal": True, "metrics_equal_to": []}
    found = {"settings": [setting], "base_mean_size": {"loss": 0.5}, "recipe": {"steps": 2}}
    found["sampler_trainer"] = {"float32": {"mean": 5e-8, "max": 7e-6, "tokens": 378}}
    written(tmp_path, "pilot", "determinism", "toy", 0, found)
    honest = {"own_name": {"bonus": 0.5}, "held_out_synonym": {"bonus": 0.1, "nodes_paid": 0.8}}
    case = {
        "bonus_leaf": 0.04,
        "bonus_top": 0.05,
        "nodes_paid": 0.25,
        "honest": honest,
        "any_vector": 0.07,
        "best_phrase": "(2 words, not shown)",
    }
    top, leaf = (case | {"shown": {"phrase": "grave risk", f"bonus_{level}": 0.03}} for level in ("top", "leaf"))
    found = {"variants": {"full": leaf | {"thresholds": [0.4, 0.3], "top": top}}, "search": {"beam": 6}}
    written(tmp_path, "pilot", "naming", "adversary", 0, found)
    return tmp_path


def test_the_page_is_up_to_date():
    page = (DOCS / "results.md").read_text()
    assert study_report.filled(page, DOCS / "results") == page, "run python benchmarks/study.py report"
    for picture in re.findall(r"\]\((results/.*?\.svg)\)", page):
        assert (DOCS / picture).exists()
    blocks = set(re.findall("<!-- study: (.*) -->", page))
    assert blocks == {f"{kind}-{form}" for kind in study_report.KINDS for form in study_report.FORMS} - {"clock-accelerator"}


def test_differences(results):
    files = scores.load(results / "accelerator")["learning"]
    grpo, words = scores.system(files["grpo"]), scores.system(files["words"])
    value, low, high = scores.difference(words, grpo, scores.unsafe_auroc)
    pairs = [(words[0], grpo[seed]) for seed in (0, 1, 2)]

    def auroc(rows, drawn) -> float:  # over pairs; what has no score or no verdict is at the wrong end
        gold, given = rows["unsafe"][drawn] > 0, np.where(np.isnan(rows["said"]), np.nan, rows["score"])[drawn]
        given = np.where(np.isnan(given), np.where(gold, -9e9, 9e9), given)
        above = np.sign(given[gold][:, None] - given[~gold])
        return float((above + 1).mean() / 2)

    own = lambda drawn: np.mean([auroc(a, drawn) - auroc(b, drawn) for a, b in pairs])  # noqa: E731
    assert value == pytest.approx(own(np.arange(P))) and value < 0
    groups, rng = grpo[0]["group"], np.random.default_rng(5)
    rows_of = {name: np.flatnonzero(groups == name) for name in set(groups.tolist())}
    names = sorted(rows_of)
    again = [own(np.concatenate([rows_of[name] for name in rng.choice(names, len(names))])) for _ in range(1000)]
    assert np.quantile(again, [0.025, 0.975]) == pytest.approx([low, high], abs=0.02)
    # Several seeds on both sides go by seed, and those that one side lacks are left out.
    two = {seed: grpo[seed] for seed in (1, 2)}
    assert scores.difference(two, grpo, scores.unsafe_f1) == (0, 0, 0)


def test_nothing_said_is_wrong():
    rows = {"unsafe": np.array([1.0, 0, 1, 0]), "score": np.array([2.0, -2, 1, -1]), "said": np.array([1.0, 0, 1, 0])}
    rows["id"] = np.array(list("abcd"))
    assert scores.once(rows, scores.unsafe_auroc) == scores.once(rows, scores.unsafe_f1) == 1
    for column in ("score", "said"):
        lacking = rows | {column: np.array([np.nan, *rows[column][1:]])}
        assert scores.once(lacking, scores.unsafe_auroc) == 0.5
    assert scores.once(lacking, scores.unsafe_f1) == pytest.approx(2 / 3)


def test_only_equal_rows_are_compared(results):
    files = scores.load(results / "accelerator")["learning"]
    grpo, words = scores.system(files["grpo"]), scores.system(files["words"])
    words[0]["id"] = words[0]["id"][::-1]
    with pytest.raises(ValueError, match="different rows"):
        scores.difference(words, grpo, scores.unsafe_auroc)
    with pytest.raises(ValueError, match="no seed in common"):
        scores.difference({7: grpo[0], 8: grpo[1]}, grpo, scores.unsafe_auroc)


def test_names_are_of_their_own_rows(results):
    rows = scores.rows(scores.load(results / "accelerator")["naming"]["full"][0])
    plain = judged(0, 2)
    masked = [x for k, x in zip(plain["named_rows"], plain["naming"], strict=True) if plain["category"][k] == "ood"]
    of = lambda column, kind="ood": scores.once(rows, lambda *args: scores.of_kind((kind,), column, *args))  # noqa: E731
    assert of("naming") == pytest.approx(np.mean(masked)) and of("ood_detected") == 0.5 and np.isnan(of("naming", "absent"))
    right = rows | {"category_right": (rows["category"] == "ood") * 1.0}  # by ids that are right too
    assert scores.once(right, lambda *args: scores.of_kind(("ood",), "ood_detected", *args)) == 1
    assert np.isnan(scores.once(right, lambda *args: scores.of_kind(("ood",), "naming", *args)))


def test_blocks(results):
    found = {form: scores.load(results / form) for form in study_report.FORMS}
    text = {f"{kind}-{form}": study_report.block(kind, form, found[form]) for kind in study_report.KINDS for form in study_report.FORMS}
    run = {"learning-accelerator", "curve-accelerator", "naming-accelerator", "data-accelerator", "clock-pilot", "determinism-pilot"}
    run |= {"adversary-pilot", "thoughts-accelerator", "obedience-accelerator"}
    assert {name for name, block in text.items() if block != study_report.NOT_RUN} == run
    learning = text["learning-accelerator"]
    assert "| **GRPO** | 3 | 40 | 0." in learning and "| zero-shot | 3 |" in learning and "Not run in this form: majority; " in learning
    assert "set_a (14 rows, 7 unsafe)" in learning and "1.5e12 | 12 |" in learning
    assert "`python benchmarks/study.py run learning --form accelerator --seeds 0 1 2`" in learning
    assert "* grpo, words: commit abc1234, 2026-01-02; cpu a processor" in learning
    assert "| as experiment 1 | 3 |" in text["data-accelerator"] and "| 30.0, 32.2 |" in text["data-accelerator"]
    assert "| the likeliest | 0." in text["thoughts-accelerator"] and "| 0.800 | 0.050 | 800 | 16 |" in text["thoughts-accelerator"]
    assert "| permuted | - | 0 | 0.500 | 4 |" in text["obedience-accelerator"]
    assert "| masked | one name | 3 | 10 | 0.500<br>+0.000" in text["naming-accelerator"]
    assert "| 1 | 3 of 3 | 13 | 21.0 | 3 of 3 | 13 | 33.0 | 1.57 |" in text["clock-pilot"]
    assert "| 2 | 0 of 3 | - | - |" in text["clock-pilot"] and "](results/clock_pilot.svg)" in text["clock-pilot"]
    assert "| full | leaf | 0.400 / 0.300 | 0.04 | 0.1 | 0.5 | 0.07 | 0.250, 0.800 | grave risk (0.0300) |" in text["adversary-pilot"]
    assert "| 1 device | yes | 2 of 2 |" in text["determinism-pilot"]


def test_only_blocks_are_replaced(tmp_path):
    page = "By hand.\n\n<!-- study: data-pilot -->\n{}<!-- end -->\n\n<!-- study: clock-pilot -->\n{}<!-- end -->\nBelow.\n"
    made = page.format(*["\nNot run in this form.\n\n"] * 2)
    assert study_report.filled(page.format("old\n", ""), tmp_path) == study_report.filled(made, tmp_path) == made
    for wrong, match in (
        ("<!-- study: data-gpu -->\n<!-- end -->", "no block 'data-gpu'"),
        ("<!-- study: other-pilot -->\n<!-- end -->", "no block 'other-pilot'"),
        ("<!-- study: data-pilot -->\ntext", "data-pilot is not closed"),
        ("<!-- study: data-pilot -->\n<!-- study: clock-pilot -->\n<!-- end -->", "data-pilot is not closed"),
        ("text\n<!-- end -->", "an end without a beginning"),
    ):
        with pytest.raises(ValueError, match=match):
            study_report.filled(wrong, tmp_path)


def test_plots_are_the_same_each_time(results, tmp_path):
    study_plots = pytest.importorskip("study_plots", exc_type=ImportError)
    made = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        for form in study_report.FORMS:
            study_plots.draw(scores.load(results / form), form, folder)
        made.append({file.name: file.read_text() for file in folder.iterdir()})
    assert made[0] == made[1] and made[0].keys() == {"curve_accelerator.svg", "clock_pilot.svg"}
    for text in made[0].values():
        assert text.startswith("<?xml") and len(text) < 60_000 and "seconds" in text
