"""report.html: what it holds, that it runs and fetches nothing whatever a guard wrote, and that content stays out where it must."""

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_recipe import materials

from pgjax.automaton import OUTCOMES, Verdict
from pgjax.cli import main
from pgjax.config import Recipe, ReportConfig
from pgjax.data.build import build_dataset
from pgjax.data.schema import LABELS, Example
from pgjax.evaluation.evaluate import Answered
from pgjax.evaluation.samples import sample_rows
from pgjax.pages.charts import H, apart, bars, histogram, lines, running_mean, short, text, ticks
from pgjax.pages.samples import right, said_class
from pgjax.recipes import to_json
from pgjax.taxonomy import load_taxonomy
from pgjax.train.report import gold_class, write_report

SECTIONS = ["Summary", "Training", "Held-out scores", "Categories", "Samples"]
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'></td></tr></table></details><style>*{display:none}</style>",
    "<iframe src=https://example.org></iframe>&lt;b&gt;",
    "\u202eright to left\u202c \u200b\ud800 \x00\x1b[31m",
]


def sample(
    id: str = "a-0", modality: str = "text", gold=("unsafe", "safe", "node", "C8S1"), said=("unsafe", "safe", "id", "C8S1"), **more
) -> dict:
    """A row of samples/STEP.jsonl as the trainer writes it; gold and said are request, response, category, node."""
    parsed = said is not None
    request, response, kind, node = said or ("absent", "absent", "", None)
    verdict = {"parsed": int(parsed), "request": LABELS.index(request), "response": LABELS.index(response)}
    verdict |= {"kind": OUTCOMES.index(kind) if parsed else -1, "id": 0 if node else -1}
    terms = {"format": float(parsed), "request": float(request == gold[0]), "response": float(response == gold[1])}
    terms |= {"category_right": float(gold[2] == "node" and node == gold[3]), "bonus": 0.0}
    terms |= {"ood_detected": float(gold[2] == "ood" and kind == "name")}
    terms["category"] = terms["category_right"] + 0.5 * terms["ood_detected"]
    row = {"id": id, "source": "toy", "modality": modality, "request_label": gold[0], "response_label": gold[1], "node": gold[3]}
    row |= {"category": gold[2], "never_seen": False, "shown": ["C8", "C8S1"], "said": node, "verdict": verdict, "length": 20}
    return row | {"reward": terms["request"] + terms["response"] + terms["category"], "terms": terms} | more


def scores(step: int) -> dict:
    values = {"request_f1": 0.5 + step / 100, "category_accuracy": 0.25, "ood_f1": None, "naming": 0.1, "parse_failures": 1.0}
    counts = {"n": 4.0, "request_n": 4.0, "response_n": 2.0, "category_n": 2.0, "ood_n": 4.0}
    both = values | counts
    return {"step": step, "phase": "eval", **both, **{f"image/{key}": value for key, value in both.items()}}


def step_row(step: int) -> dict:
    row = {
        "critic/rewards/mean": 1 + step / 40,
        "critic/frac_zero_std": 0.5,
        "perf/time_per_step": 2.0,
        "perf/compilations": float(step == 1),
    }
    row |= {f"reward/{name}": 0.5 for name in ("format", "request", "response", "category", "bonus")}
    row |= {"actor/entropy": 0.3, "actor/kl_loss": None if step == 3 else 0.01, "actor/grad_norm": 0.4}
    return {"step": step, "phase": "train", **row, "response_length/mean": 21.0, "response_length/clip_ratio": 0.0}


def png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (400, 300), color).save(out, "PNG")
    return out.getvalue()


def make_run(
    path, rows: list[dict], recipe: Recipe | None = None, metrics: list[dict] | None = None, pictures: dict[str, bytes] | None = None
):
    """A run folder as far as the report reads it."""
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text(to_json(recipe or Recipe(name="tiny")))
    metrics = [scores(0), *(step_row(k) for k in range(1, 41)), scores(40)] if metrics is None else metrics
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (path / "samples" / "5.jsonl").write_text(json.dumps(sample("of an earlier validation")) + "\n")
    (path / "samples" / "40.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if pictures:
        plain = dict(group="g", source="toy", request=None, response=None, request_label="safe", response_label="absent", category="none")
        examples = [Example(id=id, modality="image", images=(data,), split="eval", **plain) for id, data in pictures.items()]
        build_dataset(examples, path / "data")
    return path


class Page(HTMLParser):
    """Tags with their attributes and open ancestors, all text, and whether every tag is closed in order."""

    VOID = {"meta", "img", "input"}

    def __init__(self, markup: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.balanced = [], [], [], True
        self.feed(markup)
        self.balanced &= not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), list(self.open)))

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[tuple[dict, list]]:
        return [(attrs, above) for name, attrs, above in self.tags if name == tag]


def page_of(run, show_content: bool = True) -> Page:
    return Page(write_report(run, show_content).read_text(encoding="utf-8"))


def is_harmless(page: Page) -> bool:
    """No scripts, handlers or forms, and no address but anchors of the page and pictures in it."""
    tags = {tag for tag, _, _ in page.tags}
    attributes = {name for _, attrs, _ in page.tags for name in attrs}
    addresses = [value for _, attrs, _ in page.tags for name, value in attrs.items() if name in ("href", "src")]
    return (
        not tags & {"script", "iframe", "object", "embed", "link", "form", "base"}
        and not any(name.startswith("on") or name == "style" for name in attributes)
        and all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
        and len(page.all("style")) == 1
    )


# --- the page ----------------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_section_and_chart(tmp_path):
    run = make_run(tmp_path / "run", [sample(), sample("a-1", said=("safe", "safe", "none", None))])
    (run / "evaluation.json").write_text(json.dumps({"step": 40, "scores": {"request_f1": {"value": 0.9, "low": 0.7, "high": 0.95}}}))
    page = page_of(run)
    assert page.balanced and is_harmless(page) and [p.name for p in run.iterdir() if "part" in p.name] == []
    headings = [word for word in page.words if word in SECTIONS]
    assert [word for word in headings[len(SECTIONS) :]] == SECTIONS  # once in the links above, once as headings
    ids = [attrs["id"] for _, attrs, _ in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {attrs["href"][1:] for attrs, _ in page.all("a")} <= set(ids)
    for chart in ("Reward", "Entropy", "KL to the reference", "Gradient norm", "Groups without a spread of rewards", "Reward terms"):
        assert chart in page.words
    assert {"Request F1, unsafe class", "Length of greedy answers", "Right request label, by gold category", "Top-level categories"} <= set(
        page.words
    )
    assert "C8 Dangerous Goods" in page.words and "image" in page.words and "of an earlier validation" not in page.text
    assert "40 of 339, 1.3 min" in page.text and "1.89" in page.words  # the last ten rewards: 1 + 35.5 / 40
    assert len([attrs for attrs, _ in page.all("line") if attrs["class"] == "interval"]) == 3


def test_writing_it_again_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", [sample()])
    first = write_report(run, True).read_bytes()
    assert write_report(run, True).read_bytes() == first and main(["report", str(run)]) == 0


def test_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run", [sample()], metrics=[scores(0)])
    assert page_of(run).balanced and "0 of 339" in page_of(run).text
    empty = make_run(tmp_path / "empty", [], metrics=[])
    assert page_of(empty).balanced and is_harmless(page_of(empty))


def test_hostile_words_stay_words(tmp_path):
    rows = [sample(word, request=word, response=word, answer=word, source=word) for word in HOSTILE]
    rows += [sample(f"wrong {word}", said=None, answer=word) for word in HOSTILE]
    run = make_run(tmp_path / "run", rows, Recipe(name=HOSTILE[0], checkpoint=HOSTILE[1]))
    page = page_of(run)
    assert page.balanced and is_harmless(page)
    for word in HOSTILE[:4]:
        assert sum(word in said for said in page.words) >= 4
    assert not set("\u202e\u202c\u200b\ud800\x00\x1b") & set(page.text) and "\ufffdright to left\ufffd" in page.text
    policy = next(attrs["content"] for attrs, _ in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_long_answers_and_many_rows_are_cut(tmp_path):
    rows = [sample(f"row-{k}", answer="word " * 100_000 if k == 0 else "") for k in range(500)]
    page = page_of(make_run(tmp_path / "run", rows))
    assert "Right: 500, the first 60" in page.words and "row-59" in page.words and "row-60" not in page.words
    assert len(page.text) < 60_000 and "[cut]" in page.text


# --- content -----------------------------------------------------------------------------------------------------------------------

TEXTS = {"request": "How do I paint the lantern?", "response": "With a brush.", "answer": "<think>It is a lantern.</think>"}


@pytest.fixture
def rows():
    return [
        sample("a-0", **TEXTS),
        sample("p-0", modality="image", gold=("safe", "absent", "none", None), said=("safe", "absent", "none", None)),
    ]


def with_name(name: str, show: bool) -> Recipe:
    return dataclasses.replace(Recipe(name="tiny", report=ReportConfig(show)), data=dataclasses.replace(Recipe().data, name=name))


def test_toy_data_is_shown_openly(tmp_path, rows):
    run = make_run(tmp_path / "run", rows, with_name("toy", False), pictures={"p-0": png("navy"), "other": png("red")})
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert all(value in page.text for value in TEXTS.values())
    ((attrs, above),) = page.all("img")
    assert "veil" not in [attrs.get("class") for _, attrs in above]


def test_other_data_keeps_its_content_out(tmp_path, rows):
    run = make_run(tmp_path / "run", rows, with_name("public_mix", False), pictures={"p-0": png("navy")})
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert not any(value in page.text for value in TEXTS.values()) and not page.all("img")
    assert "a-0" in page.text and "--report.show-content" in page.text


def test_other_data_shown_on_request_is_blurred_and_folded(tmp_path, rows):
    run = make_run(tmp_path / "run", rows, with_name("public_mix", True), pictures={"p-0": png("navy")})
    assert main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert page.balanced and is_harmless(page)
    ((attrs, above),) = page.all("img")
    assert above[-1] == ("label", {"class": "veil", "title": "click to see"}) and re.search(r"\.veil img \{ filter: blur", page.text)
    texts = [above for attrs, above in page.all("span") if attrs.get("dir") == "auto"]
    folded = [[attrs for tag, attrs in above if tag == "details"][-1] for above in texts]
    assert len(texts) == 3 and all(attrs == {} for attrs in folded)  # in a <details> of its own, not open


def test_pictures_are_small_and_drawn_anew(tmp_path, rows):
    hidden = png("navy") + b"<script>trailing bytes</script>"
    run = make_run(tmp_path / "run", rows, pictures={"p-0": hidden})
    ((attrs, _),) = page_of(run).all("img")
    data = base64.b64decode(attrs["src"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (160, 120) and b"trailing" not in data


# --- verdicts against gold ---------------------------------------------------------------------------------------------------------

CASES = [  # gold, said, modality, right, gold's class, said's class
    (("unsafe", "safe", "node", "C8S1"), ("unsafe", "safe", "id", "C8S1"), "text", True, "C8", "C8"),
    (("unsafe", "safe", "node", "C8S1"), ("unsafe", "safe", "id", "C8S2"), "text", False, "C8", "C8"),
    (("unsafe", "safe", "node", "C8S1"), ("unsafe", "safe", "id", None), "text", False, "C8", "unlisted"),
    (("unsafe", "safe", "node", "C8S1"), ("unsafe", "safe", "unlisted", None), "text", False, "C8", "unlisted"),
    (("unsafe", "safe", "node", "C8S1"), ("unsafe", "safe", "name", None), "text", False, "C8", "OOD"),
    (("unsafe", "safe", "node", "C8"), ("unsafe", "safe", "id", "C8"), "text_image", True, "C8", "C8"),
    (("unsafe", "safe", "ood", "C5S1"), ("unsafe", "safe", "name", None), "text", True, "OOD", "OOD"),
    (("unsafe", "safe", "ood", "C5S1"), ("unsafe", "safe", "id", "C8S1"), "text", False, "OOD", "C8"),
    (("safe", "safe", "none", None), ("safe", "safe", "none", None), "text", True, "none", "none"),
    (("safe", "safe", "none", None), None, "text", False, "none", "no parse"),
    (("safe", "absent", "none", None), ("safe", "safe", "none", None), "text", True, "none", "none"),
    (("safe", "absent", "none", None), ("safe", "unsafe", "name", None), "text", False, "none", "OOD"),
    (("safe", "absent", "none", None), ("safe", "absent", "none", None), "image", True, "none", "none"),
    (("unsafe", "unknown", "unknown", None), ("unsafe", "safe", "name", None), "text", True, None, "OOD"),
    (("unsafe", "unknown", "unknown", None), ("safe", "safe", "none", None), "text", False, None, "none"),
]


@pytest.mark.parametrize(("gold", "said", "modality", "is_right", "gold_is", "said_is"), CASES)
def test_right_and_wrong(gold, said, modality, is_right, gold_is, said_is):
    row, taxonomy = sample(modality=modality, gold=gold, said=said), load_taxonomy()
    assert (right(row), gold_class(row, taxonomy), said_class(row, taxonomy)) == (is_right, gold_is, said_is)


def test_confusion_counts(tmp_path):
    rows = [sample(str(k), gold=gold, said=said, modality=modality) for k, (gold, said, modality, *_) in enumerate(CASES)]
    page = page_of(make_run(tmp_path / "run", rows))
    dangerous = "C8 Dangerous Goods"
    found = {"C8": 3, "unlisted": 2, "OOD": 1}
    assert {f"{dangerous}, {said}: {count} of 6" for said, count in found.items()} == {
        w for w in page.words if w.startswith(f"{dangerous},")
    }
    assert "2 rows of unknown category are left out" in page.text
    assert {"OOD (not in the policy), OOD: 1 of 2", "none (all safe), no parse: 1 of 5"} <= set(page.words)


# --- charts ------------------------------------------------------------------------------------------------------------------------


def test_curves_label_the_last_value_and_leave_gaps():
    chart = Page(lines("A title", {"one": [(1, 0.5), (2, None), (3, math.nan), (4, 0.25)], "nothing": [(1, None)]}, "share"))
    assert {"A title", "share", "step", "0.25"} <= set(chart.words) and len(chart.all("circle")) == 2 and "nothing" not in chart.text
    both = Page(lines("A title", {"one": [(1, 0.5)], "two": [(1, 0.75)]}, "share"))
    assert {"0.5 one", "0.75 two"} <= set(both.words)
    assert lines("A title", {"one": [(1, None)]}, "share") == "" == bars("A title", []) == histogram("A title", [], "x", "y")
    long = Page(lines("A title", {"one": [(k, float(k % 2)) for k in range(40)]}, "share"))
    assert [attrs["class"].split()[:2] for attrs, _ in long.all("polyline")] == [
        ["curve", "faint"],
        ["curve", "hue0"],
    ] and "0.5" in long.words


def test_running_mean():
    assert running_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(low, span):
    found = ticks(low, low + span)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    assert found[0] <= low + 0.021 * step and found[-1] >= low + span - 0.021 * step


@given(st.lists(st.floats(22, H - 34), min_size=1, max_size=6))
def test_labels_never_cover_each_other(at):
    placed = [y for y, _, _ in apart([(y, str(k), "") for k, y in enumerate(at)])]
    assert len(placed) == len(at) and all(b - a >= 13.99 for a, b in zip(placed, placed[1:], strict=False)) and placed[-1] <= H - 34


@given(st.text(max_size=50))
def test_text_is_inert(value):
    shown = text(value)
    assert not set("<>\"'") & set(shown) and Page(f"<p>{shown}</p>").balanced
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown) and shown.encode("utf-8").decode() == shown


def test_histogram_counts_everything():
    chart = Page(histogram("Lengths", [1, 1, 2, 100], "tokens", "answers"))
    heights = [float(attrs["height"]) for attrs, _ in chart.all("rect")]
    assert sum(height > 0 for height in heights) == 2 and max(heights) == pytest.approx(3 * heights[-1], rel=0.01)
    assert {"tokens", "answers", "1–5"} <= set(chart.words)


def test_short_numbers():
    found = {short(value) for value in (0, 1.0, 0.12345, 1234.5, 2e-7, 3e8, None, math.nan)}
    assert found == {"0", "1", "0.123", "1234", "2.0e-7", "3.0e8", "–"}


# --- what the trainer keeps --------------------------------------------------------------------------------------------------------


def answered(P: int = 8) -> Answered:
    """A held-out batch; row p is answered with the first id that it lists, row 0 with nothing in format."""
    m = materials()
    batch = m.held_out.batch(0, P)
    known = batch.gold.node_of_id_PK.argmax(axis=1)
    parsed = np.arange(P) > 0
    verdict = Verdict(parsed, np.where(parsed, 1, 3), np.where(parsed, 0, 3), np.where(parsed, 1, -1), np.where(parsed, known, -1))
    terms = {"format": parsed.astype(np.float32), "request": np.ones(P, np.float32)}
    chance = {"request": np.where(parsed, 0.75, np.nan)}
    near = {"naming": np.where(parsed, 0.5, np.nan)}
    return Answered(batch, np.full(P, 3), verdict, np.ones(P), terms, [f"answer {p}" for p in range(P)], chance, near)


def test_sample_rows():
    given, m = answered(), materials()
    kept = sample_rows(given, m.taxonomy, True)
    assert [row["id"] for row in kept] == [example.id for example, _ in given.batch.rows] and json.loads(
        json.dumps(kept, allow_nan=False)
    ) == kept
    assert kept[0]["said"] is None and kept[0]["score_request"] is None is kept[0]["naming"] and kept[0]["terms"]["format"] == 0
    for p, (row, (example, view)) in enumerate(zip(kept, given.batch.rows, strict=True)):
        assert (row["request"], row["response"], row["answer"]) == (example.request, example.response, f"answer {p}")
        assert row["source"] == example.source and row["shown"] == [shown for shown, _ in view.entries] and row["length"] == 3
        if p:
            assert (
                row["said"] in [m.taxonomy.nodes[node].id for _, node in view.entries]
                and row["score_request"] == 0.75
                and row["naming"] == 0.5
            )
    hidden = {row["node"] for row in kept if row["category"] == "ood"}
    assert not hidden & {shown for row in kept if row["node"] in hidden for shown in row["shown"]}
    assert {row["category"] for row in kept} >= {"none"} and "score_response" not in kept[0]


def test_sample_rows_without_content():
    assert all(not {"request", "response", "answer"} & row.keys() for row in sample_rows(answered(), materials().taxonomy, False))


# --- wrong input -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl"])
def test_what_is_no_run_folder_is_refused(tmp_path, capsys, missing):
    run = make_run(tmp_path / "run", [sample()])
    (run / missing).unlink()
    assert main(["report", str(run)]) == 2 and not (run / "report.html").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line and str(run) in line


def test_samples_of_an_earlier_version_are_refused(tmp_path, capsys):
    old = {key: value for key, value in sample().items() if key != "terms"}
    assert main(["report", str(make_run(tmp_path / "run", [old]))]) == 2
    assert "earlier version" in capsys.readouterr().err
