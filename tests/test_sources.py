"""Public data: what each reader makes of its format, groups that never part, a set that is never trained on, and the real files' counts.

All files here are made by the tests; their texts are mild and ours.
"""

import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pgjax.automaton import id_grid
from pgjax.data.pipeline import Pipeline
from pgjax.data.schema import EVALUATION_ONLY
from pgjax.data.sources.files import data_root, gather, split_of, text_group
from pgjax.data.sources.label_map import LabelMap
from pgjax.data.sources.mix import public_mix
from pgjax.data.sources.pictures import drawn, figstep, mossbench
from pgjax.data.sources.tables import read_rows
from pgjax.data.sources.texts import openai_moderation, openai_moderation_strict, surge_toxicity
from pgjax.data.toy import toy_texts
from pgjax.data.typography import ACTIVITIES, OPENERS, REQUEST, SIDE, benign_titles, render
from pgjax.recipes import load_recipe
from pgjax.taxonomy import load_taxonomy, parse_taxonomy
from pgjax.tokenizer import train_byte_bpe

TAXONOMY = load_taxonomy()
RECIPE = load_recipe("public_mix")
IDS = id_grid(11, 3)
ZEROS = dict.fromkeys(("S", "H", "V", "HR", "SH", "H2", "V2"), 0)
TITLES = 60
NEXT_LINE, LINE_SEPARATOR = "\x85", "\u2028"


def png(side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 220, 240)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


packed = partial(gzip.compress, mtime=0)  # of whatever time: a test is named by what it is given


def write_openai(root: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return put(root / "openai_moderation" / "samples.jsonl.gz", packed(lines.encode()))


def write_surge(root: Path, rows: list[tuple[str, str]]) -> Path:
    return put(root / "surge_toxicity" / "toxicity_en.csv", "\ufefftext,is_toxic\r\n" + "".join(f'"{t}",{label}\r\n' for t, label in rows))


def write_figstep(root: Path, topics: list[str], tasks: int = 1, pictures: bool = True) -> None:
    rows = ["dataset,category_id,task_id,category_name,question,instruction"]
    for c, topic in enumerate(topics, 1):
        for t in range(1, tasks + 1):
            rows.append(f"SafeBench,{c},{t},{topic},q,Steps to polish goblin lamp {c} {t}.")
            if pictures:
                put(root / "figstep" / "images" / "SafeBench" / f"query_ForbidQI_{c}_{t}_6.png", png())
    put(root / "figstep" / "question" / "safebench.csv", "\n".join(rows) + "\n")


def write_mossbench(root: Path, safe: int, contrast: int) -> None:
    for folder, count in (("data", safe), ("data_contrast", contrast)):
        rows = {str(k): {"pid": str(k), "question": f"Is lamp {k} bright?", "image": f"images/{k}.png"} for k in range(1, count + 1)}
        put(root / "mossbench" / folder / "images_information" / "information.json", json.dumps(rows))
        for k in range(1, count + 1):
            where = f"images/{k}.png" if k % 2 else f"images_640jpg/{k}.jpg"
            put(root / "mossbench" / folder / where, png())


@pytest.fixture(scope="module", autouse=True)
def few_titles():
    """Drawing all of them takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgjax.data.typography.benign_titles", lambda: itertools.islice(benign_titles(), TITLES))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All sets, small, in the formats of the real ones."""
    root = tmp_path_factory.mktemp("sets")
    prompts = [f"The {color} lamp number {k}." for k in range(20) for color in ("red", "blue")]
    write_openai(root, [{"prompt": p, **ZEROS, "V": k % 2} for k, p in enumerate(prompts)])
    write_surge(root, [(f"A {k} boats song", "Toxic" if k % 2 else "Not Toxic") for k in range(40)])
    write_figstep(root, ["Fraud", "Legal Opinion"], tasks=12)
    write_mossbench(root, 6, 4)
    return root


@pytest.fixture(scope="module")
def examples(root):
    return mix(root)[0]


@pytest.fixture(scope="module")
def tokenizer(examples):
    return train_byte_bpe(toy_texts(examples, TAXONOMY, RECIPE), 1024)


def mix(root: Path, **data):
    return public_mix(dataclasses.replace(RECIPE.data, root=str(root), **data), TAXONOMY)


def known(example) -> tuple:
    return example.request_label, example.category, example.node, example.accepted


# --- one format after the other ----------------------------------------------------------------------------------------------------


def test_openai_moderation(tmp_path):
    partial = {key: 0 for key in ("S", "H", "V")}
    write_openai(
        tmp_path,
        [
            {"prompt": f"two{LINE_SEPARATOR}lines{NEXT_LINE}here", **ZEROS},
            {"prompt": "several", **ZEROS, "H": 1, "V": 1, "V2": 1},
            {"prompt": "one key", "HR": 1},
            {"prompt": "not known", **partial},
            {"prompt": "kept away", **ZEROS, "S": 1, "S3": 1},
            {"prompt": " ", **ZEROS},
        ],
    )
    read = gather(openai_moderation_strict(tmp_path, TAXONOMY))
    assert read.left_out == {"label unknown": 1, "withheld category": 1, "empty": 1}
    safe, several, one = read.examples
    assert known(safe) == ("safe", "none", None, ()) and safe.request == f"two{LINE_SEPARATOR}lines{NEXT_LINE}here"
    assert known(several) == ("unsafe", "node", "C10S3", ("C7S3", "C9S3", "C10S2", "C7S2", "C7S1"))
    assert known(one) == ("unsafe", "node", "C7S1", ("C3S2",)) and one.name == TAXONOMY.by_id("C7S1").name
    assert {(e.response, e.response_label, e.modality, e.images) for e in read.examples} == {(None, "absent", "text", ())}


def test_surge_toxicity(tmp_path):
    write_surge(tmp_path, [("good, kind words", "Not Toxic"), ("grumpy words", "Toxic"), ("", "Toxic")])
    read = gather(surge_toxicity(tmp_path, TAXONOMY))
    assert [(e.request, *known(e)) for e in read.examples] == [
        ("good, kind words", "safe", "none", None, ()),
        ("grumpy words", "unsafe", "unknown", None, ()),
    ]
    assert read.left_out == {"empty": 1}


def test_figstep_and_drawn_pictures(tmp_path):
    write_figstep(tmp_path, ["Malware Generation", "Health Consultation"])
    published, ours = gather(figstep(tmp_path, TAXONOMY)).examples, gather(drawn(tmp_path, TAXONOMY)).examples
    assert [known(e) for e in published] == [("unsafe", "node", "C4S2", ("C4S1",)), ("unsafe", "ood", None, ())]
    assert published[1].name == "Specialised Health Advice"
    assert [e.images for e in published] == [(png(),)] * 2
    unsafe, safe = [e for e in ours if e.request_label == "unsafe"], [e for e in ours if e.request_label == "safe"]
    assert [(known(e), e.group) for e in unsafe] == [(known(e), e.group) for e in published], "a task is one group, drawn or published"
    assert unsafe[0].images == (render("Steps to polish goblin lamp 1 1."),)
    assert len(safe) == TITLES and {known(e) for e in safe} == {("safe", "none", None, ())}
    assert {(e.modality, e.request) for e in published + ours} == {("text_image", REQUEST)}, "the request tells nothing"
    (tmp_path / "figstep/images/SafeBench/query_ForbidQI_1_1_6.png").unlink()
    read = gather(figstep(tmp_path, TAXONOMY))
    assert len(read.examples) == 1 and read.left_out == {"no picture": 1}


def test_mossbench(tmp_path):
    write_mossbench(tmp_path, 3, 2)
    (tmp_path / "mossbench/data/images_640jpg/2.jpg").unlink()
    read = gather(mossbench(tmp_path, TAXONOMY))
    assert read.left_out == {"no picture": 1}
    assert [(e.id, e.group, e.request_label, e.category) for e in read.examples] == [
        ("mossbench-data-1", "mossbench-1", "safe", "none"),
        ("mossbench-data-3", "mossbench-3", "safe", "none"),
        ("mossbench-data_contrast-1", "mossbench-1", "unsafe", "unknown"),
        ("mossbench-data_contrast-2", "mossbench-2", "unsafe", "unknown"),
    ]
    assert {e.split for e in read.examples} == {"eval"}


def test_a_label_map_is_made_for_the_packaged_taxonomy():
    small = parse_taxonomy("- category: Lamps\n  description: d\n  synonymous-phrase: [glow]\n")
    with pytest.raises(ValueError, match="figstep.yaml is made for the packaged taxonomy.*no category id"):
        LabelMap("figstep", small)


# --- bad input ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_root_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("PGJAX_DATA", raising=False)
    with pytest.raises(ValueError, match="set PGJAX_DATA, or --data.root"):
        data_root(None)
    with pytest.raises(ValueError, match="is no folder; set --data.root"):
        data_root(str(tmp_path / "nowhere"))
    monkeypatch.setenv("PGJAX_DATA", str(tmp_path))
    assert data_root(None) == tmp_path
    with pytest.raises(ValueError, match="openai_moderation/samples.jsonl.gz is not there below .*--data.root"):
        mix(tmp_path)


@pytest.mark.parametrize(
    ("reader", "path", "data", "message"),
    [
        (openai_moderation_strict, "openai_moderation/samples.jsonl.gz", b"not gzip", "is broken"),
        (openai_moderation_strict, "openai_moderation/samples.jsonl.gz", packed(b'{"prompt": "a", "S": 1}\n{"pro'), "row 2 is not"),
        (openai_moderation_strict, "openai_moderation/samples.jsonl.gz", packed(b'[1]\n'), "row 1 must be an object"),
        (openai_moderation_strict, "openai_moderation/samples.jsonl.gz", packed(b'{"prompt": "a", "S": 2}\n'), "row 1 has a label"),
        (surge_toxicity, "surge_toxicity/toxicity_en.csv", b"text\nhello\n", "lacks the column 'is_toxic'"),
        (surge_toxicity, "surge_toxicity/toxicity_en.csv", b"text,is_toxic\nhello\n", "row 1 ends early"),
        (surge_toxicity, "surge_toxicity/toxicity_en.csv", b"text,is_toxic\nhello,Maybe\n", "row 1 has a label"),
        (surge_toxicity, "surge_toxicity/toxicity_en.csv", b"text,is_toxic\n\xff,Toxic\n", "is broken"),
        (mossbench, "mossbench/data/images_information/information.json", b'{"1": {"pid": 1}}', "row 1 needs a text in `image`"),
        (mossbench, "mossbench/data/images_information/information.json", b"[", "is not JSON"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, reader, path, data, message):
    put(tmp_path / path, data)
    with pytest.raises(ValueError, match=message) as error:
        gather(reader(tmp_path, TAXONOMY))
    assert len(str(error.value).splitlines()) == 1 and "hello" not in str(error.value)


def test_an_unknown_topic_of_figstep_is_named_by_its_row(tmp_path):
    write_figstep(tmp_path, ["Fraud", "Lamp Theft"])
    with pytest.raises(ValueError, match="safebench.csv: row 2 has a topic that the label map figstep.yaml lacks"):
        gather(figstep(tmp_path, TAXONOMY))


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=5))
def test_json_lines_are_cut_at_line_feeds_alone(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("lines")
    put(root / "rows.jsonl", "".join(json.dumps({"t": t}, ensure_ascii=False) + "\n" for t in texts))
    assert [row.text("t") for row in read_rows(root, "rows.jsonl")] == texts


def test_tables_keep_line_breaks_inside_quotes(tmp_path):
    put(tmp_path / "t.csv", '\ufeffa,b\r\n"one\r\ntwo",3\r\n')
    assert [row.values for row in read_rows(tmp_path, "t.csv", ("a", "b"))] == [{"a": "one\r\ntwo", "b": "3"}]


# --- splits ------------------------------------------------------------------------------------------------------------------------


@given(st.text(alphabet="ab ,.!é", max_size=12), st.text(alphabet=" ,.!_\n", max_size=4))
def test_copies_of_a_text_are_one_group(text, noise):
    assert text_group(text) == text_group(noise + text.upper() + noise)
    assert text_group(text) != text_group(text + "z")


def test_a_fifth_of_the_groups_is_held_out_whatever_the_order():
    splits = [split_of(f"group {k}") for k in range(4000)]
    assert 0.17 < splits.count("eval") / 4000 < 0.23
    assert [k for k in range(24) if splits[k] == "eval"] == [3, 6, 13, 17], "the split of a group never changes"


def test_no_group_and_no_row_is_in_two_splits(examples):
    groups: dict[str, set[str]] = {}
    for example in examples:
        groups.setdefault(example.group, set()).add(example.split)
    assert all(len(splits) == 1 for splits in groups.values())
    assert len({e.id for e in examples}) == len(examples)
    assert Counter(e.source for e in examples if e.split == "train").keys() == {
        "openai_moderation",
        "surge_toxicity",
        "figstep",
        "typography",
    }
    assert {e.source for e in examples} - {e.source for e in examples if e.split == "train"} == EVALUATION_ONLY


def test_copies_over_two_sets_stay_together(root, tmp_path):
    for k in range(12):
        write_openai(tmp_path, [{"prompt": f"Lamp {k}", **ZEROS}])
        write_surge(tmp_path, [(f"lamp  {k}!", "Not Toxic")])
        [a], [b] = (gather(reader(tmp_path, TAXONOMY)).examples for reader in (openai_moderation_strict, surge_toxicity))
        assert (a.group, a.split) == (b.group, b.split)


def test_limits_take_a_share_of_every_source(root, examples):
    few, left_out = mix(root, train_examples=90, eval_examples=20)
    assert Counter(e.split for e in few) == {"train": 90, "eval": 20}
    assert [e for e in few if e.split == "eval"] == [e for e in examples if e.split == "eval"][:20]
    assert {e.source for e in few if e.split == "train"} == {"openai_moderation", "surge_toxicity", "figstep", "typography"}
    assert left_out == {"openai_moderation_strict": {}, "surge_toxicity": {}, "figstep": {}, "drawn": {}, "mossbench": {}}


def test_nothing_trains_on_a_set_for_evaluation_only(root, tokenizer):
    rows = [dataclasses.replace(e, split="train") for e in gather(mossbench(root, TAXONOMY)).examples]
    with pytest.raises(ValueError, match="mossbench is for evaluation only"):
        Pipeline(rows, TAXONOMY, tokenizer, RECIPE, "train", IDS)


# --- pictures ----------------------------------------------------------------------------------------------------------------------


def test_drawn_pictures(tokenizer):
    first, second = render("Steps to polish a lamp."), render("Steps to polish a boat.")
    assert first == render("Steps to polish a lamp.") and first != second
    image = np.asarray(Image.open(io.BytesIO(first)))
    assert image.shape == (SIDE, SIDE) and image[0].min() == 255 and (image < 128).any()
    long = np.asarray(Image.open(io.BytesIO(render("A title of many words. " * 9))))
    assert (long < 128)[: SIDE // 2].any() and (long[-3:] == 255).all(), "all lines are on the picture"


def test_titles_are_as_many_and_as_long_as_they_need_to_be():
    titles = [title for _, title in benign_titles()]
    assert len(set(titles)) == len(titles) == 9 * len(ACTIVITIES)
    shares = Counter(next(o for o in OPENERS if title.startswith(o.split(" {")[0])) for title in titles)
    assert set(shares.values()) == {len(titles) // 3}
    assert 50 < np.median([len(title) for title in titles]) < 65  # FigStep's: 58


# --- the pipeline and the recipe ---------------------------------------------------------------------------------------------------


def test_rows_fit_and_the_cache_spares_the_pictures(examples, tokenizer, tmp_path, monkeypatch):
    make = lambda recipe=RECIPE: Pipeline(examples, TAXONOMY, tokenizer, recipe, "eval", IDS, cache=tmp_path / "fit.json")  # noqa: E731
    first = make()
    assert not first.dropped and len(first) == sum(e.split == "eval" for e in examples)

    def decodes(*_):
        raise AssertionError("a picture was decoded again")

    monkeypatch.setattr("pgjax.data.pipeline.load_image", decodes)
    again = make(dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, buckets=2, workers=2)))
    assert again.kept.tolist() == first.kept.tolist() and again.dropped == first.dropped and again.sizes.tolist() == first.sizes.tolist()
    with pytest.raises(AssertionError, match="decoded again"):
        make(dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, patches=16)))


def test_what_the_cache_says_was_dropped(examples, tokenizer, tmp_path):
    recipe = dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, patches=48))
    made = [Pipeline(examples, TAXONOMY, tokenizer, recipe, "eval", IDS, cache=tmp_path / "fit.json") for _ in range(2)]
    assert made[0].dropped == made[1].dropped and made[0].dropped["patches"] > 0


def test_gold_of_public_rows(examples, tokenizer):
    pipeline = Pipeline(examples, TAXONOMY, tokenizer, RECIPE, "train", IDS)
    batch = pipeline.batch(0, 64)
    gold = batch.gold
    assert (gold.response_P == 3).all() and set(gold.request_P.tolist()) == {0, 1}
    for p, (example, _) in enumerate(batch.rows):
        if example.category in ("none", "unknown"):
            assert gold.node_P[p] == -1 and not gold.accepted_PN[p].any()
        if example.source == "figstep" and example.category == "node":
            assert gold.node_P[p] == TAXONOMY.index("C3") and "C6" in [TAXONOMY.nodes[n].id for n in np.flatnonzero(gold.accepted_PN[p])]


# --- the real files ----------------------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(not os.environ.get("PGJAX_DATA"), reason="PGJAX_DATA names no folder of public sets")


@real
def test_counts_of_the_real_files():
    root = data_root(None)
    for reader, count, unsafe, left_out in (
        (openai_moderation_strict, 774, 437, {"label unknown": 821}),
        (openai_moderation, 1595, 437, {}),
        (surge_toxicity, 1000, 501, {}),
        (figstep, 500, 500, {}),
        (mossbench, 524, 235, {"no picture": 20}),
    ):
        read = gather(reader(root, TAXONOMY))
        unsafe_rows = [e for e in read.examples if e.request_label == "unsafe"]
        assert (len(read.examples), len(unsafe_rows), dict(read.left_out)) == (count, unsafe, left_out), reader.__name__
        parts = {e.group: {f.split for f in read.examples if f.group == e.group} for e in read.examples[:50]}
        assert all(len(splits) == 1 for splits in parts.values())
    assert sum(e.category == "ood" for e in gather(figstep(root, TAXONOMY)).examples) == 150
    assert LabelMap("openai_moderation", TAXONOMY).withheld("S3")


# --- the baselines -----------------------------------------------------------------------------------------------------------------


def test_baselines():
    pytest.importorskip("sklearn", reason="the extra `bench` is not installed")
    file = Path(__file__).parent.parent / "benchmarks" / "baselines.py"
    spec = importlib.util.spec_from_file_location("baselines", file)
    b = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(b)
    train = [b.Row(f"t{k}", "both", "lamp broken" if k % 3 else "lamp shines", bool(k % 3)) for k in range(30)]
    train += [b.Row(f"u{k}", "one", "boat", True) for k in range(5)]
    held_out = [b.Row("a", "both", "broken boat", True), b.Row("b", "both", "it shines", False), b.Row("c", "one", "boat", True)]
    held_out += [b.Row("d", "mossbench", "lamp broken", True), b.Row("e", "mossbench", "lamp shines", False)]
    systems = b.baselines(train, held_out)
    assert [s.unsafe_B.tolist() for s in systems] == [[True] * 5, [True] * 5, [True, False, True, True, False]]
    lines = b.table(train, held_out, systems)
    assert lines[2] == "| **headline**: both | 2 | 1 | majority | 0.667 | 0.333 | 0.500 |"
    assert lines[4] == "| **headline**: both | 2 | 1 | TF-IDF + logistic regression | 1.000 | 1.000 | 1.000 |"
    assert any(line.startswith("| one (one label) | 1 | 1 | majority | 1.000 | 1.000 | - |") for line in lines)
    assert any(line.startswith("| mossbench (evaluation only) | 2 | 1 |") for line in lines)
