"""What a model was trained on lies beside it, goes with an export, and is refused by an evaluation unless that is asked for."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from tiny_recipe import folder, materials, tiny_recipe
from tiny_run import load_guard, make_run

from pgjax.cli import main
from pgjax.data.build import read_dataset
from pgjax.data.duplicates import content_key, shown_keys
from pgjax.data.rows import conversation
from pgjax.serving.guard import Guard
from pgjax.train.materials import check_same_rows, make_materials
from pgjax.train.training_rows import TRAINING_ROWS, overlap, read_training_rows, write_training_rows

VAULT, GATE = (conversation(text, None, None) for text in ("Polish the vault", "Paint the gate"))


def trained() -> list:
    """The rows that the tiny run's training split shows."""
    kept = materials().train.kept.tolist()
    rows = read_dataset(folder() / "data", "train")
    return [rows[index] for index in kept]


def test_keys_are_written_once_and_read_again(tmp_path):
    (tmp_path / "data").mkdir()
    assert read_training_rows(tmp_path) is None
    answered = conversation("Polish the vault", "Gladly.", None)
    write_training_rows(tmp_path, [GATE, answered, GATE])
    write_training_rows(tmp_path, [])
    keys = np.load(tmp_path / TRAINING_ROWS)
    assert keys.shape == (3, 16) and keys.dtype == np.uint8 and (tmp_path / TRAINING_ROWS).stat().st_size == 128 + 3 * 16
    assert sorted(map(bytes, keys)) == list(map(bytes, keys)) == sorted(shown_keys(GATE) | shown_keys(answered))
    assert read_training_rows(tmp_path) == set(map(bytes, keys))
    asked = dataclasses.replace(VAULT, request_label="safe")
    other = conversation("Oil the hinge", None, None)
    assert overlap([asked, GATE, other, GATE], read_training_rows(tmp_path)) == 3


def test_a_dataset_that_is_built_anew_is_another(tmp_path):
    """Its keys lie beside the run once and for all."""
    root, known = tmp_path / "set", tmp_path / "built.txt"
    root.mkdir()
    (root / "card.json").write_text('{"hash": "amber"}')
    for _ in range(2):
        check_same_rows(root, known)
    (root / "card.json").write_text('{"hash": "cedar"}')
    with pytest.raises(ValueError, match="was built anew since"):
        check_same_rows(root, known)


def test_what_a_checkpoint_was_trained_on_is_carried_on(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "data").mkdir(parents=True)
    write_training_rows(tmp_path / "first", [VAULT])
    write_training_rows(tmp_path / "second", [GATE], str(tmp_path / "first"))
    assert read_training_rows(tmp_path / "second") == {content_key(VAULT), content_key(GATE)}


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"words", np.zeros((2, 8), np.uint8), np.zeros(16, np.uint8), np.zeros((2, 16))])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / TRAINING_ROWS
    np.save(file, content) if isinstance(content, np.ndarray) else file.write_bytes(content)
    with pytest.raises(ValueError, match="training_rows.npy must hold content keys, .*copy the model's folder again"):
        read_training_rows(tmp_path)


def test_a_run_keeps_the_keys_of_what_its_training_split_shows(tmp_path):
    """And not of rows that do not fit: those of never-seen categories, or too long."""
    recipe, rows = tiny_recipe(), trained()
    assert read_training_rows(folder()) == set().union(*map(shown_keys, rows))
    short = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, prompt_tokens=128))
    shutil.copytree(folder() / "tokenizer", tmp_path / "tokenizer")
    made = make_materials(short, tmp_path)
    assert made.train.dropped["prompt"] and read_training_rows(tmp_path) < read_training_rows(folder())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    materials()
    shutil.copytree(folder() / "data", path / "data")
    return path


@pytest.fixture(scope="module")
def guard(run):
    with load_guard(run, rows=4) as guard:
        yield guard


def evaluate(run, *more) -> int:
    return main(["evaluate", "--model", str(run), "--limit", "6", "--data", str(run.parent), *more])


def test_rows_that_were_trained_on_are_refused_or_counted(run, guard, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Guard, "load", lambda *_, **__: guard)
    monkeypatch.setattr(Guard, "close", lambda *_: None)
    seen = next(row for row in trained() if row.modality == "text")
    file = run.parent / "xstest" / "xstest_prompts.csv"
    file.parent.mkdir()
    with open(file, "w", newline="") as lines:
        rows = [(f"  {seen.request.upper()}!", "safe"), ("Who mends the pebble bridge?", "safe"), ("Who steals it?", "unsafe")]
        csv.writer(lines).writerows([("prompt", "label"), *rows])

    out = tmp_path / "out"
    assert evaluate(run, "--benchmark", "held_out", "xstest", "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert "was trained on 1 of 3 rows of xstest; --held-out may" in error and "--allow-overlap" in error and not out.exists()
    assert "held_out;" not in error and seen.request.casefold() not in error.casefold() and "Traceback" not in error

    assert evaluate(run, "--benchmark", "held_out", "xstest", "--out", str(out), "--allow-overlap", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overlap"] == {"held_out": 0, "xstest": 1} and found["benchmarks"]["xstest"]["rows"] == 3
    for name in ("report.html", "tables.md"):
        assert "This guard was trained on rows of xstest (1)" in (out / name).read_text().replace("\\", "")

    (run / TRAINING_ROWS).rename(tmp_path / "aside.npy")
    assert evaluate(run, "--benchmark", "xstest", "--out", str(tmp_path / "unknown"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["overlap"] is None
    assert "Overlap with training is unknown" in (tmp_path / "unknown" / "tables.md").read_text()
    (tmp_path / "aside.npy").rename(run / TRAINING_ROWS)


def test_an_export_says_what_it_was_trained_on(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert read_training_rows(tmp_path / "exported") == read_training_rows(run) and len(read_training_rows(run)) > 50
