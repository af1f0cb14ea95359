"""A user's own labelled rows: what each says, and what is refused by file and line."""

import json

import pytest

from pgjax.data.jsonl import Line
from pgjax.data.rows import labelled, own_rows
from pgjax.taxonomy import load_taxonomy

TAXONOMY = load_taxonomy()


def read(tmp_path, **row):
    return labelled(Line(tmp_path / "train.jsonl", 7, row), TAXONOMY, "train")


def test_labels_and_categories(tmp_path):
    safe = read(tmp_path, request="How do I clean it?", request_label="safe")
    assert (safe.category, safe.response_label, safe.id, safe.group, safe.split) == ("none", "absent", "train-7", "train-7", "train")
    unsafe = read(tmp_path, id="a", group="g", request="r", response="s", request_label="unsafe", response_label="safe", category="C6S1")
    assert (unsafe.category, unsafe.node, unsafe.group, unsafe.name) == ("node", "C6S1", "g", TAXONOMY.by_id("C6S1").name)
    unlisted = read(tmp_path, request="r", request_label="unsafe", category="ood", name="Moon Piracy")
    assert (unlisted.category, unlisted.node, unlisted.name) == ("ood", None, "Moon Piracy")
    assert read(tmp_path, request="r", request_label="unsafe").category == "unknown"
    open_row = read(tmp_path, request="r", response="s", request_label="safe")
    assert (open_row.response_label, open_row.category) == ("unknown", "unknown")


@pytest.mark.parametrize(
    "row, said",
    [
        (dict(request="r", request_label="harmful"), "request_label 'harmful' must be safe or unsafe"),
        (dict(request="r", response_label="safe"), "response_label without a response"),
        (dict(request="r", request_label="unsafe", category="C77"), "C77"),
        (dict(request="r", request_label="unsafe", category="none"), "category none does not go with labels"),
        (dict(request="r", request_label="safe", category="C6S1"), "category C6S1 does not go with labels absent and safe"),
        (dict(request="r", lable="safe"), "unknown key 'lable'"),
        (dict(image="none.png"), "none.png"),
        (dict(request=""), "nothing to moderate"),
    ],
)
def test_refused_rows(tmp_path, row, said):
    with pytest.raises(ValueError, match="train.jsonl line 7") as error:
        read(tmp_path, **row)
    assert said in str(error.value)


def test_a_folder(tmp_path):
    write = lambda name, *rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("train.jsonl", dict(request="r", request_label="safe", group="g"))
    with pytest.raises(ValueError, match="eval.jsonl"):
        own_rows(str(tmp_path), TAXONOMY)
    write("eval.jsonl", dict(request="r", request_label="safe", group="g"))
    with pytest.raises(ValueError, match="group 'g' has rows in train.jsonl and in eval.jsonl"):
        own_rows(str(tmp_path), TAXONOMY)
    write("eval.jsonl", dict(request="r", request_label="safe"))
    assert [(e.split, e.source) for e in own_rows(str(tmp_path), TAXONOMY)] == [("train", "own"), ("eval", "own")]
    with pytest.raises(ValueError, match="--data.root"):
        own_rows(None, TAXONOMY)
