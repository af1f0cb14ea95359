"""The sets to evaluate on: what each reader makes of its published format, the label maps, and the names of risks outside the taxonomy.

All files here are made by the tests; their texts are mild and ours.
"""

import csv
import gzip
import io
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_sources import LINE_SEPARATOR, png, put

from pgjax.data.schema import Example
from pgjax.data.sources import label_map
from pgjax.data.sources.benchmarks import BENCHMARKS, read_benchmark
from pgjax.data.sources.files import NotUsed, Unusable, data_root
from pgjax.data.sources.label_map import LabelMap, outside
from pgjax.data.sources.registry import SOURCES
from pgjax.evaluation.summary import published
from pgjax.taxonomy import load_taxonomy

TAXONOMY = load_taxonomy()
MAPS = sorted(path.stem for path in (Path(label_map.__file__).parent / "labels").glob("*.yaml"))
PICTURE = {"bytes": png(), "path": "1.png"}


def write(path: Path, rows: list[dict]) -> None:
    """Rows in the format that the suffixes name."""
    match path.suffix:
        case ".csv":
            table = io.StringIO(newline="")
            writer = csv.DictWriter(table, rows[0])
            writer.writeheader()
            writer.writerows(rows)
            put(path, "\ufeff" + table.getvalue())
        case ".parquet":
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".json":
            put(path, json.dumps(rows))
        case ".gz" | ".xz":
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            put(path, (gzip if path.suffix == ".gz" else lzma).compress(lines))


def known(example: Example) -> tuple:
    """Labels of request and response, and the category: its node or name, with what else counts as right."""
    about = {"node": example.node, "ood": example.name}.get(example.category, example.category)
    return example.request_label, example.response_label, " ".join([about or "", *example.accepted])


def aegis(prompt: str, response: str | None, labels: str, categories: str) -> dict:
    first, _, second = labels.partition(" ")
    row = {"id": "1", "prompt": prompt, "response": response, "prompt_label": first, "response_label": second or None}
    return row | {"violated_categories": categories, "prompt_label_source": "human"}


def wild(prompt: str, response: str | None, first: str | None, second: str | None) -> dict:
    return {"prompt": prompt, "adversarial": False, "response": response, "prompt_harm_label": first, "response_harm_label": second}


def beaver(safe: bool, *categories: str, response: str = "It shines.") -> dict:
    names = LabelMap("beavertails", TAXONOMY).order
    return {"prompt": "About a lamp", "response": response, "category": {n: n in categories for n in names}, "is_safe": safe}


def beaver_v(category: str, safe: str, image: dict | None = PICTURE, question: str = "A lamp?", response: str | None = "Yes.") -> dict:
    row = {"question": question, "image": image, "category": category, "image_severity": 1, "response": response}
    return row | {"is_response_safe": safe}


def llava(id: str, category: str, rating: str, split: str = "test", image: str = "pictures/1.png") -> dict:
    return {"id": id, "split": split, "image": image, "category": category, "rating": rating, "rationale": "r"}


# Set, file -> its rows, what is known of the examples, and how many rows are left out for which reason.
CASES = [
    (
        "aegis2",
        "aegis2/test.json",
        [
            aegis(f"a{LINE_SEPARATOR}lamp", None, "safe", ""),
            aegis("a grumpy lamp", "no", "unsafe safe", "Harassment, Profanity"),
            aegis("a rude lamp", "grr", "unsafe unsafe", "Needs Caution, Profanity"),
            aegis("a lamp", "grr", "safe unsafe", "Needs Caution"),
            aegis("a lamp", "no label", "safe", ""),
            aegis("a lamp", " ", "unsafe safe", ""),
            aegis("REDACTED", "a lamp", "unsafe unsafe", "Suicide and Self Harm"),
            aegis("kept away", None, "unsafe", "Sexual (minor)"),
            aegis("", None, "safe", ""),
        ],
        [
            ("safe", "absent", "none"),
            ("unsafe", "safe", "C7S1 C3S2"),
            ("unsafe", "unsafe", "Profanity and Vulgar Language C7S1"),
            ("safe", "unsafe", "unknown"),
            ("safe", "unknown", "unknown"),
            ("unsafe", "absent", "unknown"),
        ],
        {"redacted": 1, "withheld category": 1, "empty": 1},
    ),
    (
        "harmbench",
        "harmbench/behavior_datasets/harmbench_behaviors_text_all.csv",
        [
            {"Behavior": text, "SemanticCategory": category, "Tags": "", "ContextString": context}
            for text, category, context in [
                ("lamp", "copyright", ""),
                ("lamp", "chemical_biological", "A\r\ntale"),
                (" ", "harmful", "A tale"),
            ]
        ],
        [("unsafe", "absent", "C1S1 C1S2 C1S3"), ("unsafe", "absent", "C8S2")],
        {"empty": 1},
    ),
    (
        "simple_safety_tests",
        "simple_safety_tests/test cases.csv",
        [
            {"id": "1", "harm_area": area, "prompts_final": prompt}
            for area, prompt in [("Scams and fraud", "a lamp"), ("Illegal and Highly Regulated Items", "a lamp"), ("Child Safety", "away")]
        ],
        [("unsafe", "absent", "C3S1"), ("unsafe", "absent", "C8S1 C8S2 C8S3")],
        {"withheld category": 1},
    ),
    (
        "toxic_chat",
        "toxic_chat/toxic-chat_annotation_test.csv",
        [
            {"user_input": text, "model_output": "I shine.", "human_annotation": "True", "toxicity": label}
            for text, label in [("a lamp", "0"), ("a grumpy\nlamp", "1"), ("", "0")]
        ],
        [("safe", "absent", "none"), ("unsafe", "absent", "unknown")],
        {"empty": 1},
    ),
    (
        "wildguard",
        "wildguard/wildguard_test.parquet",
        [
            wild("a lamp", "it shines", "unharmful", "unharmful"),
            wild("a grumpy lamp", None, "harmful", None),
            wild("a lamp", "grr", None, "harmful"),
            wild("a lamp", "hm", "unharmful", None),
            wild("nobody knows", "hm", None, None),
            wild("nobody knows", None, None, "harmful"),
            wild("", "it shines", "unharmful", "unharmful"),
        ],
        [
            ("safe", "safe", "none"),
            ("unsafe", "absent", "unknown"),
            ("unknown", "unsafe", "unknown"),
            ("safe", "unknown", "unknown"),
        ],
        {"label unknown": 2, "empty": 1},
    ),
    (
        "xstest",
        "xstest/xstest_prompts.csv",
        [
            {"id": "1", "prompt": prompt, "type": "homonyms", "label": label, "focus": "lamp", "note": ""}
            for prompt, label in [("switch off a lamp", "safe"), ("switch off a boat", "unsafe"), ("\u2003", "safe")]
        ],
        [("safe", "absent", "none"), ("unsafe", "absent", "unknown")],
        {"empty": 1},
    ),
    (
        "xstest_response",
        "xstest_response/response_harmfulness-00000-of-00001.parquet",
        [
            {"prompt": "a lamp", "response": response, "label": label, "prompt_type": kind}
            for response, label, kind in [("shines", "unharmful", "prompt_safe"), ("grr", "harmful", "prompt_harmful"), ("hm", None, None)]
        ],
        [("safe", "safe", "none"), ("unsafe", "unsafe", "unknown")],
        {"label unknown": 1},
    ),
    (
        "xstest_response",
        "xstest_response/response_harmfulness.parquet",
        [{"prompt": "a lamp", "response": "grr", "label": "harmful"}],
        [("unknown", "unsafe", "unknown")],
        {},
    ),
    (
        "beavertails",
        "beavertails/test.jsonl.gz",
        [
            beaver(True),
            beaver(False, "animal_abuse", "controversial_topics,politics"),
            beaver(False, "controversial_topics,politics"),
            beaver(False),
            beaver(False, "child_abuse", "animal_abuse"),
            beaver(True, response=""),
        ],
        [
            ("unknown", "safe", "unknown"),
            ("unknown", "unsafe", "C9S2 C2S1"),
            ("unknown", "unsafe", "Political and Social Controversy C2S1"),
            ("unknown", "unsafe", "unknown"),
        ],
        {"withheld category": 1, "label unknown": 1},
    ),
    ("beavertails", "beavertails/test.jsonl.xz", [beaver(False, "self_harm")], [("unknown", "unsafe", "C9S1")], {}),
    (
        "beavertails_v",
        "beavertails_v/data/one/evaluation-00000-of-00001.parquet",
        [
            beaver_v("animal_abuse", "yes"),
            beaver_v("Horror and Gore", "no"),
            beaver_v("animal_abuse", "yes", response=None),
            beaver_v("animal_abuse", "yes", image=None),
            beaver_v("animal_abuse", "yes", question=""),
        ],
        [("unsafe", "safe", "C9S2"), ("unsafe", "unsafe", "C7S3 C10S1 C10S2 C10S3"), ("unsafe", "absent", "C9S2")],
        {"no picture": 1, "empty": 1},
    ),
    (
        "llavaguard",
        "llavaguard/dataset.json",
        [
            llava("1", "NA: None applying", "Safe"),
            llava("2", "O6: Weapons or Substance Abuse", "Unsafe"),
            llava("3", "NA: None applying", "Unsafe"),
            llava("4_v2", "O6: Weapons or Substance Abuse", "Safe"),
            llava("5", "O7: Self-Harm", "Unsafe", split="train"),
            llava("6", "O7: Self-Harm", "Unsafe", image="pictures/nowhere.png"),
        ],
        [("safe", "absent", "none"), ("unsafe", "absent", "C8S1 C8S3"), ("unsafe", "absent", "unknown")],
        {"other policy": 1, "other split": 1, "no picture": 1},
    ),
]
FIRST = {case[0]: case for case in reversed(CASES)}


def read(root: Path, name: str, path: str, rows: list[dict]):
    put(root / "llavaguard/pictures/1.png", png())
    write(root / path, rows)
    return read_benchmark(name, root, TAXONOMY)


@pytest.mark.parametrize(("name", "path", "rows", "expected", "left_out"), CASES, ids=[Path(case[1]).name for case in CASES])
def test_published_formats(tmp_path, name, path, rows, expected, left_out):
    examples, counted = read(tmp_path, name, path, rows)
    assert [known(e) for e in examples] == expected
    assert counted == left_out and len(examples) + counted.total() == len(rows), "every row is an example or counted"
    assert len({e.id for e in examples}) == len(examples)
    assert {(e.source, e.split) for e in examples} == {(name, "eval")}, "published test sets are never trained on"
    assert "kept away" not in {e.request for e in examples}
    has_labels = {line for e in examples for line in ("request", "response") if getattr(e, f"{line}_label") in ("safe", "unsafe")}
    assert has_labels >= set(BENCHMARKS[name])
    for e in examples:
        assert (e.response is None) == (e.response_label == "absent")
        assert e.modality == {"llavaguard": "image", "beavertails_v": "text_image"}.get(name, "text")
        assert (e.request is None) == (e.modality == "image") and e.images == (() if e.modality == "text" else (png(),))


def test_what_the_guard_reads(tmp_path):
    texts = {name: [(e.request, e.response) for e in read(tmp_path, *FIRST[name][:3]).examples] for name in ("aegis2", "harmbench")}
    assert texts["aegis2"][:2] == [(f"a{LINE_SEPARATOR}lamp", None), ("a grumpy lamp", "no")]
    assert texts["harmbench"] == [("lamp", None), ("A\r\ntale\n\n---\n\nlamp", None)], "joined as HarmBench joins them"


def test_several_files_of_one_set(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"beavertails_v/part{number}/evaluation.parquet", [beaver_v("animal_abuse", "yes")])
    examples = read_benchmark("beavertails_v", tmp_path, TAXONOMY).examples
    assert len({e.id for e in examples}) == 2 and len({e.group for e in examples}) == 1
    for suffix in ("gz", "xz"):
        write(tmp_path / f"beavertails/test.jsonl.{suffix}", [beaver(True)])
    with pytest.raises(ValueError, match="test.jsonl.gz and test.jsonl.xz are both there; leave the one that is meant"):
        read_benchmark("beavertails", tmp_path, TAXONOMY)


# --- bad input ---------------------------------------------------------------------------------------------------------------------

WRONG = [
    ("aegis2", {"prompt_label": "grumpy"}, "test.json: row 1 has a label in `prompt_label` that is neither unsafe nor safe"),
    ("aegis2", {"response": ["grumpy"]}, "row 1 needs a text in `response`, or nothing"),
    ("aegis2", {"violated_categories": "grumpy"}, "row 1 has a topic that the label map aegis2.yaml lacks; add it there"),
    ("harmbench", {"SemanticCategory": "grumpy"}, "row 1 has a topic that the label map harmbench.yaml lacks"),
    ("simple_safety_tests", {"harm_area": "grumpy"}, "row 1 has a topic that the label map simple_safety_tests.yaml lacks"),
    ("toxic_chat", {"toxicity": "grumpy"}, "row 1 has a label in `toxicity` that is neither 1 nor 0"),
    ("wildguard", {"prompt_harm_label": "grumpy"}, "row 1 has a label in `prompt_harm_label` that is neither harmful nor unharmful"),
    ("xstest", {"label": "grumpy"}, "row 1 has a label in `label` that is neither unsafe nor safe"),
    ("xstest_response", {"label": "grumpy"}, "row 1 has a label in `label` that is neither harmful nor unharmful"),
    ("beavertails", {"category": ["grumpy"]}, "row 1 needs a list of objects in `category`"),
    ("beavertails", {"category": {"grumpy": True}}, "row 1 has a topic that the label map beavertails.yaml lacks"),
    ("beavertails", {"is_safe": "grumpy"}, "row 1 has a label in `is_safe` that is neither False nor True"),
    ("beavertails_v", {"category": "grumpy"}, "row 1 has a topic that the label map beavertails_v.yaml lacks"),
    ("beavertails_v", {"is_response_safe": "grumpy"}, "row 1 has a label in `is_response_safe` that is neither no nor yes"),
    ("llavaguard", {"rating": "grumpy"}, "row 1 has a label in `rating` that is neither Unsafe nor Safe"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_a_wrong_row_is_named_and_not_shown(tmp_path, name, change, message):
    _, path, rows, *_ = FIRST[name]
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, name, path, [rows[0] | change])
    assert len(str(error.value).splitlines()) == 1 and "grumpy" not in str(error.value) and "lamp" not in str(error.value)


COLUMNS = [
    ("harmbench", "ContextString"),
    ("simple_safety_tests", "prompts_final"),
    ("toxic_chat", "toxicity"),
    ("wildguard", "response_harm_label"),
    ("xstest", "label"),
    ("xstest_response", "response"),
    ("beavertails_v", "image"),
    ("aegis2", "response_label"),
    ("beavertails", "is_safe"),
    ("llavaguard", "split"),
]


@pytest.mark.parametrize(("name", "column"), COLUMNS)
def test_a_missing_column_is_named(tmp_path, name, column):
    _, path, rows, *_ = FIRST[name]
    with pytest.raises(ValueError, match=f"{Path(path).name}.*{column}"):
        read(tmp_path, name, path, [{key: value for key, value in row.items() if key != column} for row in rows])


@pytest.mark.parametrize("name", [name for name in FIRST if "csv" not in FIRST[name][1]])
def test_a_broken_file_is_named(tmp_path, name):
    put(tmp_path / FIRST[name][1], b"\xffnothing")
    with pytest.raises(ValueError, match=f"{FIRST[name][1]}.*(is broken|not JSON)") as error:
        read_benchmark(name, tmp_path, TAXONOMY)
    assert len(str(error.value).splitlines()) == 1


def test_a_benchmark_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no benchmark 'aegis'; did you mean aegis2\?"):
        read_benchmark("aegis", tmp_path, TAXONOMY)
    with pytest.raises(ValueError, match="there is no benchmark 'lamp'; there are aegis2, harmbench, .*surge_toxicity"):
        read_benchmark("lamp", tmp_path, TAXONOMY)
    for name in BENCHMARKS.keys() - {"probes"}:  # they are of this package
        with pytest.raises(ValueError) as error:
            read_benchmark(name, tmp_path, TAXONOMY)
        assert str(tmp_path / SOURCES[name].where) in str(error.value) and SOURCES[name].origin in str(error.value)


def test_the_columns_of_the_published_tables_are_benchmarks():
    for key, table in published()["tables"].items():
        names = {name for name in table["columns"] if name != "average" and not name.startswith("proguard")}
        assert names <= BENCHMARKS.keys(), key
    assert published()["rows"]["request"].keys() <= {name for name, has in BENCHMARKS.items() if "request" in has}
    assert published()["rows"]["response"].keys() <= {name for name, has in BENCHMARKS.items() if "response" in has}


# --- label maps --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_label_maps_name_nodes_and_risks_that_there_are(name):
    labels, names = LabelMap(name, TAXONOMY), {node.name for node in outside().nodes}
    entries = yaml.safe_load((Path(label_map.__file__).parent / "labels" / f"{name}.yaml").read_text())
    reserved = {node.id for node in TAXONOMY.nodes if node.reserved}
    for label, entry in entries.items():
        assert isinstance(entry, list) or entry in ("withheld", "unknown") or entry.keys() <= {"ood", "also"}
        assert labels.withheld(label) == (entry == "withheld")
        if entry == "withheld":
            with pytest.raises(NotUsed, match="withheld category"):
                labels.about([label])
            continue
        about = labels.about([label])
        assert about["category"] == ("node" if isinstance(entry, list) else "unknown" if entry == "unknown" else "ood")
        assert not reserved & {about.get("node"), *about.get("accepted", ())}
        assert about["category"] != "ood" or about["name"] in names
    with pytest.raises(Unusable, match=f"has a topic that the label map {name}.yaml lacks"):
        labels.about(["grumpy"])


def test_risks_outside_the_taxonomy_are_all_in_use():
    used = set()
    for name in MAPS:
        labels = LabelMap(name, TAXONOMY)
        found = [labels.category([label]) for label in labels.order]
        used |= {about["name"] for about in found if about["category"] == "ood"}
    nodes = outside().nodes
    assert [node.name for node in nodes if node.name not in used] == []
    phrases = Counter(phrase.casefold() for taxonomy in (nodes, TAXONOMY.nodes) for n in taxonomy for phrase in (n.name, *n.synonyms))
    assert {len(node.synonyms) for node in nodes} == {5} and phrases.most_common(1)[0][1] == 1
    assert all(node.parent is None and not node.reserved for node in nodes)


def test_of_several_labels_the_topmost_names_the_row():
    labels = LabelMap("beavertails", TAXONOMY)
    several = labels.category(["controversial_topics,politics", "privacy_violation", "self_harm"])
    assert (several["node"], several["accepted"]) == ("C9S1", ("C2S2", "C2S1")), "a node goes before a risk outside"
    aegis = LabelMap("aegis2", TAXONOMY)
    assert aegis.category(["Other", "Immoral/Unethical", "Profanity"]) == {
        "category": "ood",
        "name": "Profanity and Vulgar Language",
        "accepted": ("C7S1", "C3S2"),
    }
    with pytest.raises(NotUsed):
        aegis.about(["Violence", "Sexual (minor)"])


# --- the real files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("PGJAX_DATA"), reason="PGJAX_DATA names no folder of public sets")
def test_counts_of_the_real_harmbench():
    examples, left_out = read_benchmark("harmbench", data_root(None), TAXONOMY)
    assert (len(examples), dict(left_out)) == (400, {})
    assert {(e.request_label, e.category) for e in examples} == {("unsafe", "node")}
    assert sum("\n\n---\n\n" in (e.request or "") for e in examples) == 100
    assert Counter(e.node for e in examples) == {"C1S1": 100, "C4S1": 67, "C6S2": 65, "C2S1": 65, "C8S2": 56, "C7S1": 25, "C9S1": 22}
