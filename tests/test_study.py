"""The study's runs on a tiny checkpoint and mild rows: files that can be compared row by row, made once."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from tiny_run import make_run, one_device

from pgjax.data.build import build_dataset
from pgjax.data.toy import toy_examples
from pgjax.export import export

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import study  # noqa: E402
import study_guard  # noqa: E402

pytestmark = pytest.mark.drill
TINY = [
    *("--grpo.steps", "2", "--grpo.prompts", "8", "--grpo.mini-prompts", "8", "--grpo.micro-prompts", "8", "--grpo.validate-prompts", "16"),
    *("--data.prompt-tokens", "320", "--answer.max-tokens", "40", "--rollout.group", "2", "--model.compute-dtype", "float32"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every run of the first experiment with one seed, by name."""
    folder = tmp_path_factory.mktemp("study")
    texts = [replace(e, source=f"source{k % 2}") for k, e in enumerate(toy_examples(0, 96, 48, ())) if e.modality == "text"]
    build_dataset(texts, folder / "data" / "pilot" / "texts")
    checkpoint = export(make_run(folder / "run"), folder / "checkpoint", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "WORK", folder)
        patch.setattr(study, "RESULTS", folder / "results")
        patch.setitem(study.FORMS, "pilot", TINY)
        runs = list(study.runs("learning", "pilot", str(checkpoint), 0))
        for run in runs:
            study.write(run, "pilot")
        files = {run.name: run.file("pilot") for run in runs}
        yield {name: json.loads(file.read_text()) for name, file in files.items()}, runs, files, str(checkpoint)


def test_every_run_judges_the_same_rows(made):
    found, *_ = made
    assert set(found) == {"grpo", "sft_rows", "sft_flops", "probe", "words", "majority", "majority_of_source"}
    gold = [(one["after"]["id"], one["after"]["group"], one["after"]["unsafe"]) for one in found.values()]
    assert gold.count(gold[0]) == len(gold) and {0, 1} == set(gold[0][2])
    for one in found.values():
        rows = one["after"]
        assert len({len(column) for name, column in rows.items() if "nam" not in name}) == 1
        assert all(score is None or abs(score) < 40 for score in rows["score"]) and set(rows["said"]) <= {0, 1, None}


def test_costs_are_equal_where_they_should_be(made):
    found, *_ = made
    grpo, rows, flops = (found[name]["cost"] for name in ("grpo", "sft_rows", "sft_flops"))
    assert rows["rows"] == grpo["rows"] == 16 and grpo["flops"] > rows["flops"]
    assert abs(flops["flops"] - grpo["flops"]) <= flops["flops"] / flops["steps"] * 1.2  # at most about a step
    assert [point["step"] for point in found["grpo"]["curve"]] == [0, 2] and found["grpo"]["curve"][1]["flops"] == grpo["flops"]
    assert None not in found["grpo"]["after"]["said"]  # constrained: every answer parses


def test_a_file_that_is_there_is_not_made_again(made):
    _, runs, files, _ = made
    before = files["words"].read_text()
    study.write(runs[[run.name for run in runs].index("words")]._replace(make=lambda: 1 / 0), "pilot")
    assert files["words"].read_text() == before


def test_guards_of_the_trained_run(made, tmp_path, monkeypatch):
    found, _, _, checkpoint = made
    recipe = study.recipe("pilot", checkpoint, 0, study.Setting(), "grpo-0")
    run = study.WORK / "pilot" / "learning" / "grpo-0"
    monkeypatch.setattr(study_guard, "THOUGHTS", (1, 2))
    with mock.patch("pgjax.train.saved.make_mesh", one_device):
        thoughts = study_guard.averaged(recipe, run)["thoughts"]
        obeyed = study_guard.obeyed(recipe, run, tmp_path / "base")
    assert set(thoughts) == {"1", "2"} and thoughts["1"]["after"]["id"] == thoughts["2"]["after"]["id"] == found["grpo"]["after"]["id"]
    assert 1.2 < thoughts["2"]["tokens"] / thoughts["1"]["tokens"] < 3 and all(
        0 <= one[name] <= 1 for one in thoughts.values() for name in ("ece", "ece_calibrated")
    )
    assert set(obeyed) == {"before", "after"} and obeyed["before"].keys() == {"permuted", "renamed", "hidden", "foreign"}
