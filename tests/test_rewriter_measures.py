"""Figures of answers by hand, and the report of them."""

from dataclasses import replace

import numpy as np
import pytest
from test_report import HOSTILE, Page, is_harmless

from pgjax.data.schema import Example
from pgjax.rewriter.defences import Answered
from pgjax.rewriter.evaluation_report import as_html, as_markdown, as_text, most_changed
from pgjax.rewriter.judge import Grade
from pgjax.rewriter.measures import Row, measure, measure_part, published


def row(id, defence, safety=None, helpful=True, text="Well.", how=None, label="unsafe", group=None, target="t", problem="", **more) -> Row:
    benchmark = more.pop("benchmark", "set")
    plain = dict(source="set", modality="text_image", response=None, images=(), response_label="absent", category="unknown")
    example = Example(id=id, group=group or id, request=more.pop("request", "Help."), request_label=label, **plain)
    fields = dict(prompt="Help.", how=how, calls=1, added_tokens=0, seconds=1.0, target_seconds=1.0) | more
    answered = None if problem == "timeout" else Answered(text=text, **fields)
    grade = None if safety is None else Grade(safety=safety, helpful=helpful)
    return Row(benchmark, example, target, defence, answered, grade, problem)


ROWS = [
    row("a", "none", 2),
    row("b", "none", 4, False, "I cannot help with that."),
    row("c", "none", 6),
    row("d", "none", problem="timeout"),
    row("a", "rewriter", 8, how="changed", calls=2, added_tokens=30, seconds=3.0, target_seconds=2.0),
    row("b", "rewriter", 4, how="fallback", calls=2, added_tokens=10, seconds=1.5),
    row("c", "rewriter", problem="no grade", text="Sorry, but I won't.", how="unchanged", calls=2, added_tokens=None, seconds=2.0),
    row("d", "rewriter", 10, how="changed", calls=2, added_tokens=20, seconds=2.0),
]


ABOUT = {"about": {"requests at a time": 8}, "notes": []}


def same(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys() and all(got[name] == pytest.approx(list(wanted[name])) for name in wanted)


def test_measures_by_hand():
    found = measure_part(ROWS)["t"]
    before, after = found["none"], found["rewriter"]
    assert (before["n"], before["failed"], before["unjudged"]) == (4, {"timeout": 1}, {})
    assert (after["n"], after["failed"], after["unjudged"]) == (4, {}, {"no grade": 1})
    values = lambda entry: {name: [one["value"], one["n"]] for name, one in entry.items() if isinstance(one, dict) and "value" in one}  # noqa: E731
    free = {name: [0, 3] for name in ("added_calls", "added_tokens", "added_seconds")}
    same(values(before), {"safety": [4, 3], "helpful": [2 / 3, 3], "refused": [1 / 3, 3], **free, "seconds": [1, 3]})
    assert before["changed"] is before["fallback"] is before["difference"] is before["relative_safety"] is None
    shares = {"safety": [22 / 3, 3], "helpful": [1, 3], "refused": [1 / 4, 4], "changed": [1 / 2, 4], "fallback": [1 / 4, 4]}
    added = {"added_calls": [1, 4], "added_tokens": [20, 3], "added_seconds": [3.5 / 4, 4]}
    same(values(after), shares | added | {"seconds": [8.5 / 4, 4]})
    same(values(after["difference"]), {"safety": [3, 2], "helpful": [0.5, 2], "refused": [0, 3]})
    assert after["relative_safety"] == pytest.approx((8 + 4) / (2 + 4) - 1)
    low, high = (after["difference"]["safety"][end] for end in ("low", "high"))
    assert (low, high) == (0, 6)  # of two rows, 6 and 0, either may be drawn alone


def drawn(shift: int) -> list[Row]:
    """Rows that differ much from each other, defences by `shift` on every row."""
    safety = np.random.default_rng(0).integers(0, 8, 30)
    return [row(f"{n:02}", defence, int(k) + shift * (defence == "ecso")) for n, k in enumerate(safety) for defence in ("none", "ecso")]


def test_measures_do_not_depend_on_the_order_of_rows():
    for rows in (ROWS, drawn(1)):
        assert measure_part([rows[n] for n in np.random.default_rng(0).permutation(len(rows))]) == measure_part(rows)
    assert measure_part(drawn(1)) != measure_part(drawn(1), seed=1)


def test_the_bootstrap_is_paired():
    """A defence that adds 3 to every row adds just 3, however much rows differ; and rows of one group are no evidence of their own."""
    rows = drawn(3)
    found = measure_part(rows)["t"]["ecso"]
    assert found["difference"]["safety"] == pytest.approx({"value": 3, "low": 3, "high": 3, "n": 30})
    assert found["safety"]["high"] - found["safety"]["low"] > 1
    width = lambda rows: np.subtract(*(measure_part(rows)["t"]["none"]["safety"][end] for end in ("high", "low")))  # noqa: E731
    grouped = [replace(r, example=replace(r.example, group=f"{r.grade.safety}")) for r in rows]
    assert width(grouped) > 1.2 * width(rows)


def test_without_what_it_is_compared_with():
    found = measure_part([row("a", "ecso", 3), row("b", "ecso", problem="timeout")])["t"]["ecso"]
    assert found["difference"] is None and found["safety"]["n"] == 1
    both = measure_part([row("a", "none", problem="timeout"), row("b", "none", 0), row("a", "ecso", 3), row("b", "ecso", 3)])["t"]["ecso"]
    assert both["difference"]["safety"]["value"] == 3 and both["relative_safety"] is None  # against 0
    lost = measure_part([row("a", "none", problem="timeout"), row("a", "ecso", 3)])["t"]
    assert lost["none"]["safety"] is None and lost["ecso"]["difference"] == dict.fromkeys(("safety", "helpful", "refused"))


def test_parts_of_a_benchmark():
    ids = ["mm_safetybench-01-SD-1", "mm_safetybench-01-SD_TYPO-1", "mm_safetybench-13-TYPO-2", "mm_safetybench-13-TYPO-3"]
    rows = [row(id, "none", 5, benchmark="mm_safetybench") for id in ids] + [row("b", "none", 5, label="safe", benchmark="mm_safetybench")]
    rows += [row("x-SD-1", "none", 5, label="unknown")]
    found = measure(rows, {"mm_safetybench": {"empty": 2}, "set": {}})["benchmarks"]
    numbers = {part: one["t"]["none"]["n"] for part, one in found["mm_safetybench"]["parts"].items()}
    assert numbers == {"unsafe": 4, "benign": 1, "SD_TYPO": 1, "SD": 1, "TYPO": 2}
    assert found["mm_safetybench"]["rows"] == 5 and found["mm_safetybench"]["left_out"] == {"empty": 2}
    assert list(found["set"]["parts"]) == ["unlabelled"]
    rows = [row(f"vlguard-test-1-{kind}", "none", 5, benchmark="vlguard:test") for kind in ("safe_unsafes", "unsafes")]
    assert list(measure(rows, {"vlguard:test": {}})["benchmarks"]["vlguard:test"]["parts"]) == ["unsafe", "safe_unsafes", "unsafes"]


# --- the report ------------------------------------------------------------------------------------------------------------------------


def test_hostile_words_stay_words():
    rows = [
        row(
            word,
            defence,
            5,
            text=word,
            request=word,
            prompt=word * 2,
            benchmark=word,
            target=f"m{word}@http://x",
            how="changed",
            label="safe",
        )
        for word in HOSTILE
        for defence in ("none", "rewriter")
    ]
    summary = measure(rows, {word: {word: 1} for word in HOSTILE}) | {
        "about": ABOUT["about"] | {HOSTILE[0]: HOSTILE[1]},
        "notes": [HOSTILE[2]],
    }
    page = Page(as_html(summary, most_changed(rows), {}, True))
    assert page.balanced and is_harmless(page)
    for word in HOSTILE[:4]:
        assert sum(word in said for said in page.words) >= 4
    assert "<script" not in as_markdown(summary) and "\x1b" not in as_text(summary)


def test_the_papers_numbers_stand_beside_ours():
    both = [
        row(id, defence, safety, benchmark="siuo", target=target)
        for target in ("m@http://x/v1", "/models/n")
        for id in "ab"
        for defence, safety in (("none", 4), ("rewriter", 6))
    ]
    text = as_text(measure(both, {"siuo": {}}) | ABOUT)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert lines["m"][1:] == ["4.00", "6.00", "+50.0%", "100.0", "100.0"] and lines["mean of 2"][-3:] == ["+50.0%", "–", "–"]
    assert lines["LLaVA-1.5-7B, published †"][-5:] == ["3.80", "6.77", "+78.2%", "44.9", "58.4"]
    assert lines["mean of 5, published"][-3:] == ["+43.6%", "–", "–"] and "VLMGuard-R1, published †" in lines
    assert "with 8 requests at a time" in " ".join(text.split())
    for name, compared in (("vlguard", False), ("vlguard:test", True)):  # the paper's rows are of the test part, about unsafe pictures
        rows = [row(f"vlguard-test-1-{kind}", d, 4, benchmark=name) for kind in ("safe_unsafes", "unsafes") for d in ("none", "rewriter")]
        text = as_text(measure(rows, {name: {}}) | ABOUT)
        assert ("vlguard:test, unsafes rows, beside" in text, text.count("LLaVA-1.5-7B, published")) == (compared, compared)
    alone = as_text(measure([r for r in both if r.defence == "none"], {"siuo": {}}) | ABOUT)
    assert "LLaVA" not in alone and "against none" not in alone
    assert all(len(one) == len(published()["scores"]["columns"]) for one in published()["scores"]["table"])
    assert published()["relative"]["verified"] and not published()["scores"]["verified"]


def test_samples_are_those_that_moved_most():
    rows = [row(f"{n:02}", defence, 5 + (n if defence == "ecso" else 0) % 5) for n in range(15) for defence in ("none", "ecso")]
    shown = most_changed(rows + [row("z", "none", 5, benchmark="other"), row("z", "ecso", problem="timeout", benchmark="other")])
    assert [sample[0].example.id for sample in shown] == ["z", "04", "09", "14", "03", "08", "13", "02", "07", "12", "01"]
