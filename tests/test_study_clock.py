"""Time to reward against TRL, in its tiny form: both sides do the same work and are judged alike. No speed is asserted."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_qwen import QUICK

from pgjax.conversation import answer_text
from pgjax.data.schema import CATEGORY_NODE, CATEGORY_NONE, CATEGORY_OOD
from pgjax.tokenizer import IM_START, answer_ids

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import study_clock as clock  # noqa: E402


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder after the warm-up, and its recipe; programs take less time to compile, and more to run."""
    folder = tmp_path_factory.mktemp("clock")
    recipe = clock.make_recipe("tiny", 0, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
        clock.prepare(recipe, folder, 0)
        yield folder, recipe


def check_steps(side: dict, steps: int) -> None:
    assert len(side["seconds"]) == len(side["reward"]) == steps and side["first_step_seconds"] == side["seconds"][0] > 0
    assert (np.diff(side["seconds"]) > 0).all() and all(0 <= reward <= 3 for reward in side["reward"])


def test_ours(prepared):
    folder, recipe = prepared
    found = clock.ours(recipe, folder, 2)
    check_steps(found, 2)
    assert found["compilations"][0] > 0 and len(found["compilations"]) == 2
    batch = clock.make_side(recipe, folder).materials.train.batch(0)
    assert {example.modality for example, _ in batch.rows} == {"text"} and (batch.prompt.image_PI == -1).all()


def test_judge(prepared):
    folder, recipe = prepared
    side = clock.make_side(recipe, folder)
    batch = side.materials.train.batch(0, 16)
    kinds = batch.gold.category_P.tolist()
    assert {*kinds} == {CATEGORY_NONE, CATEGORY_NODE, CATEGORY_OOD}
    start, ids_PG = side.materials.tokenizer.convert_tokens_to_ids(IM_START), []
    for (example, view), kind in zip(batch.rows, kinds, strict=True):
        shown = next((shown for shown, node in view.entries if side.materials.taxonomy.nodes[node].id == example.node), None)
        category = {CATEGORY_NONE: None, CATEGORY_NODE: shown, CATEGORY_OOD: example.name}[kind]
        right = answer_text(example.request_label, example.response_label, category, "So.", "text", recipe.answer.think_tag)
        [ids] = answer_ids(side.materials.tokenizer, [right])
        ids_PG.append([ids, [ids[0], start, *ids[1:]], ids[1:]])
    reward_PG = clock.judge_ids(side, ids_PG, batch.gold)
    np.testing.assert_allclose(reward_PG[:, 0], [2 if kind == CATEGORY_NONE else 3 for kind in kinds], atol=1e-5)
    np.testing.assert_array_equal(reward_PG[:, 1], reward_PG[:, 0])  # a special token in an answer is not in its text
    assert not reward_PG[:, 2].any()  # out of format


@pytest.mark.parity
def test_theirs(prepared, monkeypatch):
    pytest.importorskip("trl")
    folder, recipe = prepared
    monkeypatch.setattr(clock, "TRIAL", 2)
    setting = clock.trial(recipe, folder, 0)
    assert setting["attention"] in ("sdpa", "eager") and setting["threads"] in (1, clock.CORES)
    (folder / "trial.json").write_text(json.dumps(setting))
    found = clock.theirs(recipe, folder, 2)  # raises where the two do not run the same model, or prompts come in another order
    check_steps(found, 2)
    assert 0 < found["logprob_gap"] < 1e-5 and found["judging_seconds"] > 0


def test_run(monkeypatch, tmp_path):
    called = []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")

    def run(command, env, **_):
        name = command[command.index("--process") + 1]
        called.append(name)
        (tmp_path / f"{name}.json").write_text(json.dumps({"what": name}))
        assert "JAX_COMPILATION_CACHE_DIR" not in env and command[-2:] == ["--steps", "7"]
        return SimpleNamespace(returncode=name == "pgjax" and len(called) > 4, stderr="it broke")

    monkeypatch.setattr(clock, "subprocess", SimpleNamespace(run=run))
    found = clock.run("tiny", 5, tmp_path, 7)
    assert called == ["warm_up", "trial", "trl", "pgjax"] and (found["settings"]["seed"], found["settings"]["steps"]) == (5, 7)
    assert [found[side]["what"] for side in ("pgjax", "trl")] == ["pgjax", "trl"]
    with pytest.raises(RuntimeError, match="it broke"):
        clock.run("tiny", 5, tmp_path, 7)
    with pytest.raises(ValueError, match="on a CPU"):
        clock.run("accelerator", 0, tmp_path)


def test_table():
    rewards = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]  # means of five: 0.6, 0.8, 1.2, 1.4
    side = lambda each: {"reward": rewards, "seconds": [10 + each * n for n in range(8)], "first_step_seconds": 10}  # noqa: E731
    runs = [{"settings": {"seed": 0}, "pgjax": side(1), "trl": side(2)}]
    rows = clock.table(runs)
    assert [row["reward"] for row in rows] == [*clock.LEVELS, None]
    assert rows[0] == {"seed": 0, "reward": 1.0, "pgjax_step": 7, "pgjax_s": 16, "trl_step": 7, "trl_s": 22, "ratio": 22 / 16}
    assert rows[2] == {"seed": 0, "reward": 1.5, "pgjax_step": None, "pgjax_s": None, "trl_step": None, "trl_s": None, "ratio": None}
    assert rows[-1]["pgjax_s"] == 17 and rows[-1]["trl_s"] == 24
    assert clock.pace(runs, "trl") == {"first": 10, "median": 2, "mean": 2}
