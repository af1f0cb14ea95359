"""Drills: a real training process is killed with SIGKILL, again and again, and must end as if nobody had touched it.

An unbroken run of each trainer is what its drills compare with. `make drills` runs them.
"""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drill_runs import STOPPED, Run, assert_same, assert_saved, complaint, config, finish, unbroken, wait, write_config
from toy_lessons import tiny_rewriter, write_lessons

from pgjax.config import MeshConfig
from pgjax.recipes import validate
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import read_metrics

pytestmark = pytest.mark.drill


def test_whatever_happens_to_it(tmp_path):
    """Killed in every phase, its data gone for a while, stopped by SIGTERM: it ends as the run that nobody touched."""
    run, rng = Run(tmp_path, config()), random.Random(3)
    checkpoints = lambda: Checkpoints(run.path / "checkpoints")  # noqa: E731
    run.kill_when(lambda path: (path / ".data.part").exists())
    assert not (run.path / "data").exists()
    run.kill_when(lambda path: list(path.glob("reference/*tmp*")))
    assert Checkpoints(run.path / "reference").latest() is None
    run.kill_in("decode", 4, rng.uniform(0, 0.02))
    assert checkpoints().steps() == [0]
    without_its_data(run, tmp_path)
    process, before = run.start(), checkpoints().latest()
    wait(process, run, before + 1)
    process.terminate()
    saved = assert_saved(run, finish(process, STOPPED)[1])
    assert before < saved < 6
    run.kill_in("update", 2, rng.uniform(0, 0.02))
    assert checkpoints().latest() == saved
    run.kill_when(lambda path: list(path.glob("checkpoints/6.*tmp*")))
    assert saved <= checkpoints().latest() < 6
    run.finish()
    assert_same(run.path, unbroken())


def without_its_data(run: Run, aside: Path) -> None:
    """Files are cut in the middle of it: it says which, and that it goes on when they are back."""
    process = run.start()
    wait(process, run, 1)
    records = list((run.path / "data").glob("*train*array_record*"))
    assert records
    for file in records:
        shutil.copy(file, aside / file.name)
        file.write_bytes(b"")
    said = complaint(process, 2)
    assert f"dataset {run.path / 'data'}: row" in said and "put its files back" in said
    for file in records:
        shutil.copy(aside / file.name, file)


def test_goes_on_on_another_mesh(tmp_path):
    """Equal parameters give equal answers, and so equal rewards, on every mesh; what follows agrees to rounding."""
    run = Run(tmp_path, config())
    shutil.copytree(unbroken(), run.path)
    shutil.rmtree(run.path / "checkpoints" / "6")
    run.finish("--mesh.data", "2", "--mesh.fsdp", "1", "--grpo.micro-prompts", "2")
    here, there = ({(row["phase"], row["step"]): row for row in read_metrics(path)} for path in (run.path, unbroken()))
    assert here.keys() == there.keys()
    for name in ("critic/rewards/mean", "actor/kl_loss", "actor/grad_norm"):
        np.testing.assert_allclose(here["train", 5][name], there["train", 5][name], rtol=1e-4)


# --- the supervised trainer ----------------------------------------------------------------------------------------------------


def test_supervised_training_killed_again_and_again(tmp_path):
    """With a frozen tower, which lies in reference/."""
    tiny = tiny_rewriter(write_lessons(tmp_path / "data"))
    mesh = {"devices": 2, "mesh": MeshConfig(1, 2, 1), "model": replace(tiny.model, freeze_vision=True)}
    config = write_config(tmp_path, validate(replace(tiny, name="drill", sft=replace(tiny.sft, keep_checkpoints=2), **mesh)))
    whole, run = Run(tmp_path / "whole", config, "sft"), Run(tmp_path / "runs", config, "sft")
    whole.finish()
    losses = [row["sft/loss"] for row in read_metrics(whole.path) if row["phase"] == "sft"]
    assert len(losses) == len(set(losses)) == 6
    run.kill_when(lambda path: (path / "data" / "lessons.json").exists())
    assert Checkpoints(run.path / "reference").latest() is None
    run.kill_when(lambda path: list(path.glob("checkpoints/2.*tmp*")))
    assert Checkpoints(run.path / "checkpoints").latest() in (None, 2) and Checkpoints(run.path / "reference").latest() == 0
    run.kill_when(lambda path: any(row["step"] == 3 for row in read_metrics(path)))
    assert Checkpoints(run.path / "checkpoints").latest() in (2, 4)
    run.finish()
    assert_same(run.path, whole.path)
