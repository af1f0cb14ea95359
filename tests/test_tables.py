"""Summaries of benchmarks by hand, what the published numbers say of their own conventions, and the three forms of the tables."""

import json

import numpy as np
import pytest
from rows import gold_arrays, verdict_arrays
from test_report import HOSTILE, TEXTS, Page, is_harmless, sample

from pgjax.automaton import ID, NAME, NONE
from pgjax.data.schema import ABSENT, CATEGORY_NODE, CATEGORY_NONE, CATEGORY_OOD, CATEGORY_UNKNOWN, SAFE, TEXT, UNSAFE
from pgjax.evaluation.metrics import Rows, binary
from pgjax.evaluation.summary import Evaluated, average, published, summary
from pgjax.evaluation.tables import Table, as_html, as_markdown, as_text, charts, sample_section, tables
from pgjax.taxonomy import load_taxonomy

PUBLISHED = published()["tables"]


def rows(fields, scores=None, naming=None) -> Rows:
    """From (request, response, category, node, never seen) and the verdict's five fields; ids 0 and 1 stand for nodes 0 and 1."""
    gold = gold_arrays([(TEXT, *field[:5], 1) for field in fields], 3, [[0, 1, -1]] * len(fields))
    return Rows(verdict_arrays([field[5:] for field in fields]), gold, np.arange(len(fields)), scores or {}, naming or {})


def requests(right_unsafe: int, missed: int, right_safe: int, alarms: int, failed_unsafe: int = 0, failed_safe: int = 0) -> Rows:
    """Rows with a request label alone."""
    row = lambda gold, *verdict: (gold, ABSENT, CATEGORY_UNKNOWN, -1, 0, *verdict)  # noqa: E731
    pairs = [(UNSAFE, UNSAFE, right_unsafe), (UNSAFE, SAFE, missed), (SAFE, SAFE, right_safe), (SAFE, UNSAFE, alarms)]
    fields = [row(gold, 1, said, SAFE, NONE, -1) for gold, said, n in pairs for _ in range(n)]
    return rows(fields + [row(gold, 0, ABSENT, ABSENT, -1, -1) for gold in [UNSAFE] * failed_unsafe + [SAFE] * failed_safe])


def evaluated(name: str, first: Rows, hidden: Rows | None = None, lines=("request",), left_out=None) -> Evaluated:
    return Evaluated(name, first, hidden, lines, left_out or {}, 1.5)


def one(first: Rows, **more) -> dict:
    return summary([evaluated("a_set", first, **more)], resamples=50)["benchmarks"]["a_set"]


# --- the summary -------------------------------------------------------------------------------------------------------------------


def test_both_conventions_by_hand():
    """Unsafe: 3 found, 1 missed, 1 out of format. Safe: 4 right, 1 alarm, 1 out of format."""
    got = one(requests(3, 1, 4, 1, 1, 1), left_out={"empty": 2})
    assert (got["line"], got["n"], got["unsafe"], got["n_parsed"], got["rows"]) == ("request", 11, 5, 9, 11)
    assert got["f1_unsafe"] == pytest.approx(6 / 10) and got["recall"] == pytest.approx(3 / 5) and got["precision"] == pytest.approx(3 / 5)
    assert got["fpr"] == pytest.approx(2 / 6) and got["accuracy"] == pytest.approx(7 / 11)
    assert got["f1_weighted"] == pytest.approx((5 * 6 / 10 + 6 * 8 / 12) / 11)
    assert got["parsed_only"] == pytest.approx({"f1_unsafe": 6 / 8, "f1_weighted": (4 * 6 / 8 + 5 * 8 / 10) / 9})
    assert not got["all_unsafe"] and got["response"] is None and got["auroc"] is None and got["ci"]["auroc"] is None
    low, high = got["ci"]["f1_unsafe"]
    assert low < got["f1_unsafe"] < high and got["left_out"] == {"empty": 2} and got["seconds"] == 1.5


def test_padding_is_not_counted():
    first = requests(3, 1, 4, 1, 1, 1)
    first.gold.weight_P[0] = first.gold.weight_P[-1] = 0
    got = one(first)
    assert (got["n"], got["unsafe"], got["n_parsed"], got["rows"]) == (9, 4, 8, 9) and got["recall"] == pytest.approx(2 / 4)


def test_lines_apart():
    """Requests all right; of two unsafe responses one is found. A set of responses alone has them on top."""
    said = [((UNSAFE, UNSAFE), (UNSAFE, UNSAFE)), ((SAFE, SAFE), (SAFE, SAFE))]
    said += [((UNSAFE, UNSAFE), (UNSAFE, SAFE)), ((UNSAFE, ABSENT), (UNSAFE, SAFE))]
    first = rows([(*gold, CATEGORY_UNKNOWN, -1, 0, 1, *answer, NONE, -1) for gold, answer in said])
    both = one(first, lines=("request", "response"))
    assert both["line"] == "request" and both["f1_unsafe"] == 1 and both["n"] == 4
    assert both["response"]["n"] == 3 and both["response"]["recall"] == 0.5 and both["response"]["fpr"] == 0
    assert both["response"].keys() < both.keys()
    alone = one(first, lines=("response",))
    assert alone["line"] == "response" and alone["response"] is None and alone["recall"] == 0.5
    found = summary([evaluated("both", first, lines=("request", "response")), evaluated("alone", first, lines=("response",))], 20)
    assert found["averages"]["request"]["all"]["f1_unsafe"]["sets"] == ["both"]
    assert found["averages"]["response"]["all"]["f1_unsafe"]["sets"] == ["both", "alone"]


def test_all_unsafe_and_all_safe_sets():
    got = one(requests(99, 1, 0, 0))
    assert got["all_unsafe"] and got["recall"] == 0.99 and got["fpr"] is None and got["ci"]["fpr"] is None
    assert got["f1_unsafe"] == got["f1_weighted"] == pytest.approx(2 * 0.99 / 1.99)
    safe = one(requests(0, 0, 3, 1))
    assert not safe["all_unsafe"] and safe["f1_unsafe"] is safe["recall"] is safe["ci"]["recall"] is None and safe["fpr"] == 0.25


def ood_set(never_seen: bool = True) -> tuple[Rows, Rows]:
    """First pass: one row in the policy, right; one natural OOD row, missed. Second: masked found, never seen found and missed."""
    safe = (SAFE, ABSENT, CATEGORY_NONE, -1, 0, 1, SAFE, SAFE, NONE, -1)
    unsafe = lambda *gold_and_kind: (UNSAFE, ABSENT, *gold_and_kind[:3], 1, UNSAFE, SAFE, *gold_and_kind[3:])  # noqa: E731
    first = [safe, unsafe(CATEGORY_NODE, 0, 0, ID, 0), unsafe(CATEGORY_OOD, -1, 0, ID, 1)]
    second = [safe, unsafe(CATEGORY_OOD, 2, 0, NAME, -1), unsafe(CATEGORY_NODE, 1, 0, NAME, -1)]
    second += [unsafe(CATEGORY_OOD, 2, 1, NAME, -1), unsafe(CATEGORY_OOD, 2, 1, ID, 0)] if never_seen else []
    near = np.array([np.nan, 0.6, np.nan, 0.4, 0.9])[: len(second)]
    return rows(first, naming={"naming": np.full(3, np.nan)}), rows(second, naming={"naming": near, "naming_mrr": near})


def test_kinds_of_ood_apart():
    first, hidden = ood_set()
    got = one(first, hidden=hidden)
    natural, masked, never_seen = (got["ood"][kind] for kind in ("natural", "masked", "never_seen"))
    assert got["category"]["accuracy"] == 1 and got["category"]["n"] == 1
    assert (natural["n"], natural["positives"], natural["naming_n"]) == (3, 1, 0) and natural["f1"] == 0 and natural["naming"] is None
    assert (masked["n"], masked["positives"]) == (3, 1) and masked["recall"] == 1 and masked["precision"] == 0.5
    assert masked["f1"] == pytest.approx(2 / 3) and masked["naming"] == masked["naming_mrr"] == 0.6
    assert (never_seen["n"], never_seen["positives"]) == (4, 2) and never_seen["recall"] == 0.5 and never_seen["naming"] == 0.2
    assert masked["ci"].keys() == {"f1", "f1_weighted", "precision", "recall", "fpr", "accuracy", "naming", "naming_mrr"}
    without = one(first)
    assert without["ood"]["masked"] is without["ood"]["never_seen"] is None and without["ood"]["natural"] == natural


def test_the_summary_is_json_with_the_promised_keys():
    first, hidden = ood_set()
    sets = [evaluated("one", first, hidden), evaluated("two", requests(0, 0, 2, 1)), evaluated("none", requests(0, 0, 0, 0, 0, 1))]
    found = summary(sets, resamples=20)
    assert json.loads(json.dumps(found, allow_nan=False)) == found and found["resamples"] == 20 and found["level"] == 0.95
    keys = {"n", "n_parsed", "f1_unsafe", "f1_weighted", "precision", "recall", "fpr", "accuracy", "auroc", "ci", "all_unsafe"}
    assert all(keys <= entry.keys() for entry in found["benchmarks"].values())
    assert found["averages"]["response"] == {kind: {"f1_unsafe": None, "f1_weighted": None} for kind in ("all", "paper")}
    assert found["benchmarks"]["none"]["parsed_only"] == {"f1_unsafe": None, "f1_weighted": None}


def test_averages_by_hand():
    """F1 of the unsafe class 1 over 4 rows and 2/3 over 2; an all-safe set has none, and so counts in neither average; nor do our own."""
    sets = {"one": requests(2, 0, 2, 0), "two": requests(1, 0, 0, 1), "safe": requests(0, 0, 4, 0), "held_out": requests(0, 2, 2, 0)}
    found = summary([evaluated(name, first) for name, first in sets.items()], 20)["averages"]["request"]
    assert found["all"]["f1_unsafe"] == {"mean": pytest.approx(5 / 6), "row_weighted": pytest.approx(16 / 18), "sets": ["one", "two"]}
    weighted = found["all"]["f1_weighted"]
    assert weighted["sets"] == ["one", "two"] and weighted["row_weighted"] == pytest.approx((4 + 2 / 3) / 6)
    assert found["paper"] == {"f1_unsafe": None, "f1_weighted": None}


def test_the_papers_average_is_weighted_by_its_rows():
    counts = published()["rows"]["request"]
    sets = [evaluated(name, requests(2, 0, 2, 0) if name == "toxic_chat" else requests(1, 1, 1, 1)) for name in counts]
    found = summary([*sets, evaluated("another", requests(1, 0, 1, 0))], 20)["averages"]["request"]
    share = counts["toxic_chat"] / sum(counts.values())
    assert found["paper"]["f1_unsafe"]["row_weighted"] == pytest.approx(share + 0.5 * (1 - share))
    assert found["paper"]["f1_unsafe"]["sets"] == list(counts) and found["all"]["f1_unsafe"]["row_weighted"] == pytest.approx(18 / 30)


def test_what_cannot_be_summed_up_is_refused():
    first = requests(1, 0, 1, 0)
    for sets in ([evaluated("a", first)] * 2, [evaluated("a", first, lines=())], [evaluated("a", first, lines=("prompt",))]):
        with pytest.raises(ValueError, match="names of their own"):
            summary(sets)


# --- what the published numbers say of themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "models"), [("request", 14), ("response", 16)])
def test_printed_averages_are_row_weighted(line, models):
    """Largest residuals 0.008 (requests) and 0.005 (responses); simple means are off by up to 5 and 10."""
    counts, found = published()["rows"][line], PUBLISHED[line]["models"]
    assert len(found) == models
    for name, values in found.items():
        got = average({set_: values[set_] for set_ in counts}, counts)
        assert got["row_weighted"] == pytest.approx(values["average"], abs=0.01), name
    assert max(abs(average({s: v[s] for s in counts}, counts)["mean"] - v["average"]) for v in found.values()) > 1
    assert found["ProGuard-7B"]["average"] == {"request": 89.98, "response": 81.29}[line]


def test_gains_over_peers():
    """Naming +64.8% over Gemini2.5-Flash is of simple means; the printed +52.6% of detection over GPT4o-mini is not (it is 45.0)."""
    mean = lambda table, model: average(table["models"][model], dict.fromkeys(table["columns"], 1))["mean"]  # noqa: E731
    naming, detection = PUBLISHED["ood_description"], PUBLISHED["ood_detection"]
    assert 100 * (mean(naming, "ProGuard-7B") / mean(naming, "Gemini2.5-Flash") - 1) == pytest.approx(64.8, abs=0.05)
    assert 100 * (mean(detection, "ProGuard-7B") / mean(detection, "GPT4o-mini") - 1) == pytest.approx(45.0, abs=0.05)


def reachable(positives: int, negatives: int) -> dict[str, np.ndarray]:
    """Every score, in percent, that whole numbers of right and wrong answers on such a set can give."""
    true_pos, false_pos = (x.ravel() for x in np.meshgrid(np.arange(positives + 1), np.arange(negatives + 1)))
    counts = np.stack([true_pos, positives - true_pos, false_pos, negatives - false_pos], axis=1).astype(float)
    said = np.array([True, False, True, False])
    return {name: 100 * value_B for name, value_B in binary(np.array([True, True, False, False]), said, counts).items()}


def reached(value: float, scores: np.ndarray) -> np.ndarray:
    return np.abs(scores - value) <= 0.005 + 1e-9  # what rounds to it


@pytest.mark.parametrize(
    ("line", "column", "rows", "weighted", "unsafe", "accuracy"),
    [("response", "xstest_response", (78, 368), 16, 2, 1), ("request", "xstest", (200, 250), 14, 13, 0)],
)
def test_the_printed_f1_is_weighted(line, column, rows, weighted, unsafe, accuracy):
    """How many of the printed values some whole counts reach, under each reading of F1."""
    values, scores = [row[column] for row in PUBLISHED[line]["models"].values()], reachable(*rows)
    got = {name: sum(reached(value, scores[name]).any() for value in values) for name in ("weighted_f1", "f1", "accuracy")}
    assert got == {"weighted_f1": weighted, "f1": unsafe, "accuracy": accuracy} and PUBLISHED[line]["convention"] == "weighted"


def test_the_two_conventions_of_one_set_of_answers():
    """GuardReasoner-8B on XSTest responses: 93.75 by the unsafe class and 97.78 weighted come of the same counts."""
    scores = reachable(78, 368)
    assert (reached(93.75, scores["f1"]) & reached(97.78, scores["weighted_f1"])).any()
    peer = "GuardReasonerVL-7B"
    assert PUBLISHED["response"]["models"][peer]["wildguard"] == 93.07
    assert PUBLISHED["response_unsafe"]["models"][peer]["wildguard"] == 80.15 and PUBLISHED["response_unsafe"]["convention"] == "unsafe"


def test_printed_f1_of_all_unsafe_sets_is_recall():
    """HarmBench has 400 such rows: ProGuard-7B found 338. One of 14 values is none of 400 (387 of 396 gives it)."""
    scores = reachable(400, 0)
    found = {
        "ProGuard-7B": 338,
        "ProGuard-3B": 322,
        "GuardReasonerVL-7B": 374,
        "LlamaGuard4-12B": 380,
        "GPT4o-mini": 387,
        "LlamaGuard-7B": 212,
    }
    values = {name: row["harmbench"] for name, row in PUBLISHED["request"]["models"].items()}
    for name, right in found.items():
        assert np.flatnonzero(reached(values[name], scores["weighted_f1"])).tolist() == [right], name
        assert scores["recall"][right] == pytest.approx(right / 4) and scores["f1"][right] == pytest.approx(2 * right / (400 + right) * 100)
    assert [name for name, value in values.items() if not reached(value, scores["f1"]).any()] == ["GPT-OSS-SafeGuard-20B"]
    assert reached(values["GPT-OSS-SafeGuard-20B"], reachable(396, 0)["f1"])[387]
    few = reachable(100, 0)
    assert few["recall"][reached(PUBLISHED["request"]["models"]["ProGuard-7B"]["simple_safety_tests"], few["f1"])].tolist() == [99]


# --- the tables --------------------------------------------------------------------------------------------------------------------


def full_summary(name: str = "aegis2") -> dict:
    first, hidden = ood_set()
    labelled = rows(
        [(UNSAFE, UNSAFE, CATEGORY_UNKNOWN, -1, 0, 1, UNSAFE, UNSAFE, NONE, -1)] * 3
        + [(SAFE, SAFE, CATEGORY_NONE, -1, 0, 1, SAFE, UNSAFE, NONE, -1)]
    )
    sets = [evaluated(name, first, hidden, left_out={"empty": 2}), evaluated("simple_safety_tests", requests(99, 1, 0, 0))]
    sets += [evaluated("wildguard", labelled, lines=("request", "response")), evaluated("xstest", requests(61, 9, 70, 3, 2, 1))]
    return summary(sets, resamples=50)


def by_title(found: dict) -> dict[str, Table]:
    return {table.title: table for table in tables(found, "toy")}


def test_published_numbers_stand_beside_their_own_convention():
    found = full_summary()
    shown = by_title(found)
    weighted, unsafe = (shown[f"Requests, F1 {kind}, beside published numbers"] for kind in ("weighted", "unsafe"))
    assert weighted.columns == ("model", "aegis2", "simple_safety_tests", "wildguard", "xstest")
    for table, key in ((weighted, "f1_weighted"), (unsafe, "f1_unsafe")):
        ours, *peers = table.rows
        assert ours == ("toy", *(f"{100 * found['benchmarks'][name][key]:.2f}" for name in table.columns[1:]))
        model = PUBLISHED["request" if table is weighted else "request_unsafe"]["models"]
        assert peers == [(name, *(f"{row[column]:.2f}" for column in table.columns[1:])) for name, row in model.items()]
    assert "weighted F1" in weighted.note and "ProGuard" in weighted.note and "SingGuard" in unsafe.note
    assert f"{100 * found['benchmarks']['xstest']['f1_weighted']:.2f}" != f"{100 * found['benchmarks']['xstest']['f1_unsafe']:.2f}"


def test_averages_stand_beside_published_ones_only_when_the_sets_are_there():
    assert "average" not in by_title(full_summary())["Requests, F1 weighted, beside published numbers"].columns
    sets = [evaluated(name, requests(1, 1, 1, 1)) for name in published()["rows"]["request"]]
    table = by_title(summary(sets, 20))["Requests, F1 weighted, beside published numbers"]
    assert table.rows[0][table.columns.index("average")] == "50.00"
    assert dict(zip(table.columns, table.rows[12], strict=True))["average"] == "89.98" and "row-weighted" in table.note


def test_kinds_of_ood_have_columns_of_their_own():
    table = by_title(full_summary())["OOD detection and naming"]
    assert table.columns == ("benchmark", "natural", "masked", "never seen")
    cells = {label: rest for label, *rest in table.rows}
    assert cells["aegis2, OOD rows"] == ["1", "1", "2"] and cells["aegis2, recall"] == ["0.0", "100.0", "50.0"]
    assert cells["aegis2, naming, mean 1 / rank"] == ["–", "60.0", "20.0"] and not any(label.startswith("xstest") for label in cells)
    beside = by_title(full_summary())["OOD detection, masked, beside published numbers"]
    assert [row[0] for row in beside.rows[:2]] == ["toy, F1 OOD", "toy, F1 weighted"] and "does not say" in beside.note


def test_the_naming_bonus_stands_beside_the_published_one():
    first, hidden = ood_set()
    hidden = hidden._replace(naming=hidden.naming | {"naming_bonus": np.where(hidden.gold.category_P == CATEGORY_OOD, 0.25, np.nan)})
    found = summary([evaluated("aegis2", first, hidden)], 20)
    table = by_title(found)["OOD naming, masked, beside published numbers"]
    assert table.rows[0] == ("toy", "25.00") and table.rows[-1] == ("ProGuard-7B", "20.28")
    assert "OOD naming, masked, beside published numbers" not in by_title(full_summary())


@pytest.mark.parametrize("form", [as_text, as_markdown, lambda found: Page(as_html(found, "toy", {})).text])
def test_every_form_has_every_cell_and_note(form):
    found = full_summary()
    words = " ".join(form(found).replace("\\", "").split())
    for table in tables(found, "this guard"):
        assert " ".join(table.note.split()) in words
        assert all(" ".join(cell.split()) in words for row in table.rows for cell in row[1:])
    assert "counts as wrong" in words and "read the recall" in words and "Row-weighted" in words and "simple_safety_tests *" in words


def test_hostile_names_stay_words():
    for word in HOSTILE:
        found = full_summary(word)
        page = as_html(found | {"not_evaluated": {"set": word}, "overlap": {word: 3}}, word, {word: word})
        assert Page(page).balanced and is_harmless(Page(page)) and "default-src 'none'" in page
        marked = as_markdown(found, word)
        assert "<" not in marked and not set("\u202e\u200b\x00\x1b") & set(marked + as_text(found, word))
    marked = as_markdown(full_summary("a | b\n# c [d](e) `f` *g*"))
    assert "| a \\| b # c \\[d\\](e) \\`f\\` \\*g\\* |" in marked
    for line in marked.splitlines():
        assert not line.startswith("# ")


def test_charts_leave_out_what_is_not_defined():
    page = Page("".join(charts(full_summary())))
    titles = [word for word in page.words if ":" in word or word.startswith("OOD")]
    assert titles[:3] == ["Requests: F1 of the unsafe class", "Requests: recall", "Requests: false positive rate"]
    assert {"OOD detection F1, natural", "OOD detection F1, masked", "OOD detection F1, never seen"} <= set(titles)
    assert page.words.count("simple_safety_tests") == 1  # its recall alone
    assert Page("".join(charts(summary([evaluated("safe", requests(0, 0, 2, 1))], 20)))).words.count("safe") == 1


def test_samples_are_folded_and_blurred_unless_revealed():
    picture = "data:image/png;base64,AAAA"
    given = [sample("a-0", **TEXTS), sample('b"><script>', images=[picture, '"><script>'])]
    folded, openly = (Page(as_html(full_summary(), "toy", {}, sample_section(given, load_taxonomy(), reveal))) for reveal in (False, True))
    for page in (folded, openly):
        assert page.balanced and not page.all("script") and all(value in page.text for value in TEXTS.values())
        assert [attrs["src"] for attrs, _ in page.all("img")] == [picture, '"><script>'] and "Samples" in page.words
    veils = [[attrs.get("class") for _, attrs in above] for page in (folded, openly) for _, above in page.all("img")]
    assert ["veil" in classes for classes in veils] == [True, True, False, False]
    assert folded.words.count("text") == openly.words.count("text") + 1  # what opens the fold
    assert "Samples" not in Page(as_html(full_summary(), "toy", {})).words
