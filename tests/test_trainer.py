"""A whole tiny run: what it leaves, that it goes on where it stopped, and that training never sees what it must not."""

import dataclasses
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_qwen import QUICK
from tiny_recipe import P, R, materials, tiny_recipe
from tiny_run import one_device

from pgjax.bank import Bank
from pgjax.config import MeshConfig
from pgjax.data.toy import OBJECTS, toy_answers
from pgjax.grpo.trainer import train
from pgjax.recipes import to_json
from pgjax.sft.warm_up import answer_arrays
from pgjax.tokenizer import stop_ids
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.materials import make_materials
from pgjax.train.run_folder import read_config, read_metrics

NEVER = ("C5", "C6")
KEYS = (
    *("seconds", "reward_first", "reward_last", "f1_before", "f1_after", "ood_f1_before", "ood_f1_after"),
    *("naming_before", "naming_after", "parse_failures_after"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and what it said: two supervised steps, three of GRPO, validation before and after."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    jit = jax.jit
    jax.jit = functools.partial(jit, compiler_options=QUICK)
    try:
        yield path, train(tiny_recipe(), path)
    finally:
        jax.jit = jit


def test_a_run_without_usable_gradients_ends(run, tmp_path):
    """A first update throws the weights out of all bounds; what follows changes nothing, and two such steps are one too many here."""
    recipe = tiny_recipe()
    wild = dataclasses.replace(recipe.grpo.optimizer, learning_rate=1e30, max_skipped=1)
    recipe = dataclasses.replace(recipe, grpo=dataclasses.replace(recipe.grpo, steps=9, validate_every=9, optimizer=wild))
    with pytest.raises(ValueError, match="the gradient of step 3 is no number, as those of the 1 steps before it"):
        train(recipe, tmp_path / "wild")
    skipped = [row["actor/skipped"] for row in read_metrics(tmp_path / "wild") if row["phase"] == "train"]
    assert skipped[0] < 1 and skipped[1:] == [1, 1]


def lasting(row: dict) -> dict:
    """A line of metrics without what times say, or how warm the process was."""
    return {name: value for name, value in row.items() if not name.startswith(("perf/", "timing_s/"))}


def test_the_run_folder(run):
    path, summary = run
    rows = read_metrics(path)
    assert [(row["phase"], row["step"]) for row in rows] == [
        *[("warm_up", 1), ("warm_up", 2), ("eval", 0)],
        *[("train", 1), ("train", 2), ("train", 3), ("eval", 3)],
    ]
    assert rows[0]["warm_up/loss"] > 0
    assert all(np.isfinite(value) for row in rows[3:6] for name, value in row.items() if name != "phase")
    assert rows[5]["perf/compilations"] == 0
    assert read_config(path) == tiny_recipe() and read_config(path).not_a_guard
    assert sorted(int(d.name) for d in (path / "checkpoints").iterdir() if d.name.isdigit()) == [0, 2, 3]
    assert list((path / "tensorboard").glob("events.out.*")) and (path / "tokenizer" / "tokenizer.json").is_file()
    samples = [json.loads(line) for line in (path / "samples" / "3.jsonl").read_text().splitlines()]
    assert len(samples) == tiny_recipe().data.eval_examples and (path / "samples" / "0.jsonl").is_file()
    assert {"id", "modality", "request_label", "verdict", "answer"} <= samples[0].keys()


def test_the_first_and_last_validation_are_full(run):
    path, _ = run
    last = read_metrics(path)[-1]
    found = json.loads((path / "evaluation.json").read_text())
    assert found["step"] == 3 and found["counts"]["n"] == last["n"] == tiny_recipe().data.eval_examples
    defined = {name: score["value"] for name, score in found["scores"].items() if score["value"] is not None}
    assert all(last[name] == value for name, value in defined.items())
    assert {"request_auroc", "text/request_auroc", "naming_mrr", "naming_top1"} <= defined.keys()
    assert 0 <= last["request_accuracy_low"] <= last["request_accuracy"] <= last["request_accuracy_high"] <= 1


def test_the_summary_is_read_from_the_metrics(run):
    path, summary = run
    assert tuple(summary) == KEYS and json.loads((path / "summary.json").read_text()) == summary
    rows = read_metrics(path)
    rewards = [row["critic/rewards/mean"] for row in rows if row["phase"] == "train"]
    before, after = (row for row in rows if row["phase"] == "eval")
    assert summary["reward_first"] == summary["reward_last"] == pytest.approx(np.mean(rewards))
    assert (summary["f1_before"], summary["f1_after"]) == (before["request_f1"], after["request_f1"])
    assert summary["parse_failures_after"] == after["parse_failures"] and summary["seconds"] > 0


def test_a_resumed_run_gives_the_same_numbers(run):
    """As if killed after the checkpoint of step 2, in the middle of a line: step 3 and its validation come out bitwise the same."""
    path, summary = run
    copy = Path(tempfile.mkdtemp(dir=path.parent)) / "tiny"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "checkpoints" / "3")
    (copy / "summary.json").unlink()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "pha')
    again = train(tiny_recipe(), copy)
    assert list(map(lasting, read_metrics(copy))) == list(map(lasting, read_metrics(path)))
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    assert (copy / "samples" / "3.jsonl").read_text() == (path / "samples" / "3.jsonl").read_text()


def test_checkpoints_without_their_reference_are_kept(tmp_path):
    """What is copied in part is not started over."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(tiny_recipe()))
    Checkpoints(run / "checkpoints", 1).save(2, {"w": np.zeros(2)})
    with pytest.raises(ValueError, match="has checkpoints and no reference/"):
        train(tiny_recipe(), run)
    assert Checkpoints(run / "checkpoints", 1).latest() == 2


@pytest.mark.drill
def test_a_program_is_compiled_once_for_a_bucket(tmp_path, capsys):
    """The second step has the other bucket; the first and last evaluation have both."""
    tiny = tiny_recipe()
    recipe = dataclasses.replace(
        tiny,
        seed=1,
        devices=1,
        mesh=MeshConfig(),
        data=dataclasses.replace(tiny.data, buckets=2, workers=2),
        rollout=dataclasses.replace(tiny.rollout, packed_step=0.0),
        warm_up=dataclasses.replace(tiny.warm_up, steps=0),
        grpo=dataclasses.replace(tiny.grpo, steps=4, mini_prompts=P, micro_prompts=P, validate_every=0, checkpoint_every=0),
    )
    quick = mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
    with quick, mock.patch("pgjax.grpo.trainer.make_mesh", one_device):
        train(recipe, tmp_path / "run")
    assert "128 tokens, 64 patches (88 rows); 152 tokens, 64 patches (8 rows); padding" in capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "run") if row["phase"] == "train"]
    made = make_materials(recipe, tmp_path / "run").train
    prompts = [made.batch(k, P).prompt for k in range(4)]
    assert [prompt.tokens_PT.shape[1] for prompt in prompts] == [128, 152, 128, 128]
    assert [row["perf/compilations"] > 0 for row in rows] == [True, True, False, False]
    assert [row["data/padding"] for row in rows] == pytest.approx([1 - p.length_P.sum() / p.tokens_PT.size for p in prompts])
    patches = [(prompt.image_PI >= 0).mean() for prompt in prompts]
    assert [row.get("data/patch_padding", 1) for row in rows] == pytest.approx([1 - share for share in patches])
    assert ["data/patch_padding" in row for row in rows] == [share > 0 for share in patches] == [True, False, True, True]


# --- the two kinds of unknown risk: never-seen ones occur nowhere in training --------------------------------------------------


def gone() -> tuple[set[str], list[str]]:
    """Ids of the never-seen categories with all below them, and the phrases that speak of them: names, synonyms, toy objects."""
    taxonomy = materials().taxonomy
    nodes = [node for node in taxonomy.nodes if node.id in NEVER or node.parent in NEVER]
    phrases = [phrase for node in nodes for phrase in (node.name, *node.synonyms, *OBJECTS.get(node.id, ()))]
    return {node.id for node in nodes}, [phrase.lower() for phrase in phrases]


def mentions(text: str, phrases: list[str]) -> list[str]:
    return [phrase for phrase in phrases if re.search(rf"\b{re.escape(phrase)}\b", text.lower())]


def test_never_seen_categories_occur_nowhere_in_training():
    m, recipe, (ids, phrases) = materials(), tiny_recipe(), gone()
    assert tuple(recipe.data.ood.never_seen) == NEVER and len(ids) == 6 and len(phrases) > 30
    shown, rng = set(), np.random.default_rng(0)
    for k in range(8):
        batch = m.train.batch(k, 32)
        assert not batch.gold.never_seen_P.any()
        for tokens, length in zip(batch.prompt.tokens_PT, batch.prompt.length_P, strict=True):
            assert not mentions(m.tokenizer.decode(tokens[:length]), phrases)
        for example, view in batch.rows:
            assert example.node not in ids and not ids & set(example.accepted)
            shown |= {m.taxonomy.nodes[node].id for _, node in view.entries}
            for right in (False, True):
                for answer in toy_answers(rng, example, view, m.taxonomy, 4, right, "think", NEVER):
                    assert not mentions(answer, phrases)
    assert len(shown) > 20 and not shown & ids


def test_never_seen_categories_have_no_training_reward_and_no_token():
    m, (ids, phrases) = materials(), gone()
    seen = " ".join(" ".join((n.name, *n.synonyms, *OBJECTS.get(n.id, ()))).lower() for n in m.taxonomy.nodes if n.id not in ids)
    rows = [m.taxonomy.index(id) for id in ids]
    banks: tuple[Bank, Bank] = (m.bank, m.full_bank)
    training, full = (np.asarray(bank.valid_NS) for bank in banks)
    assert not training[rows].any() and full[rows].any(axis=1).all()
    assert m.bank.max_threshold == m.full_bank.max_threshold
    held_out = [m.held_out.batch(k, 8) for k in range(m.held_out.batches(8))]
    assert sum(int(batch.gold.never_seen_P.sum()) for batch in held_out) > 0
    words = {word for phrase in phrases for word in phrase.split() if len(word) > 6 and word not in seen}
    merged = {m.tokenizer.decode([k]).strip().lower() for k in range(len(m.tokenizer))}
    assert len(words) > 10 and not words & merged


# --- the supervised answers ----------------------------------------------------------------------------------------------------


def test_supervised_answers_end_with_the_stop_token():
    tokenizer = materials().tokenizer
    tokens_PGR, length_PG = answer_arrays([["a safe answer", "ok"]], tokenizer, R)
    stop = stop_ids(tokenizer)[0]
    for tokens, length, text in zip(tokens_PGR[0], length_PG[0], ["a safe answer", "ok"], strict=True):
        assert tokens[length - 1] == stop and (tokens[length:] == 0).all() and tokenizer.decode(tokens[: length - 1]) == text
    with pytest.raises(ValueError, match="answer.max_tokens 4"):
        answer_arrays([["a much longer answer than that, with many words"]], tokenizer, 4)


def test_the_recipe_is_the_demo_made_small():
    recipe = tiny_recipe()
    assert recipe.devices == 8 and dataclasses.astuple(recipe.mesh) == (2, 2, 2) and recipe.grpo.prompts == P
