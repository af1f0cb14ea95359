"""Drills: a real training process is killed with SIGKILL, again and again, and must end as if nobody had touched it.

An unbroken run of each trainer is what its drills compare with. `make drills` runs them.
"""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from drill_runs import Run, assert_same, config, unbroken, write_config
from toy_lessons import tiny_rewriter, write_lessons

from pgjax.config import MeshConfig
from pgjax.recipes import validate
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import read_metrics

pytestmark = pytest.mark.drill


def test_killed_in_every_phase(tmp_path):
    run, rng = Run(tmp_path, config()), random.Random(3)
    run.kill_when(lambda path: (path / ".data.part").exists())
    assert not (run.path / "data").exists()
    run.kill_when(lambda path: len(read_metrics(path)) == 2)
    assert {row["phase"] for row in read_metrics(run.path)} == {"warm_up"}
    run.kill_when(lambda path: list(path.glob("reference/*tmp*")))
    assert Checkpoints(run.path / "reference").latest() is None
    run.kill_in("decode", 4, rng.uniform(0, 0.02))
    assert Checkpoints(run.path / "checkpoints").steps() == [0]
    run.kill_in("update", 6, rng.uniform(0, 0.02))
    assert Checkpoints(run.path / "checkpoints").steps() == [0, 2]
    run.kill_when(lambda path: list(path.glob("checkpoints/4.*tmp*")))
    assert Checkpoints(run.path / "checkpoints").latest() == 2
    run.finish()
    assert_same(run.path, unbroken())


def test_killed_at_random(tmp_path):
    """The delay reaches from inside a program into what follows it: other programs, validation, checkpoints, the report."""
    run, rng = Run(tmp_path, config()), random.Random(11)
    for _ in range(2):
        run.kill_in(rng.choice(("decode", "score", "update")), rng.randint(2, 4), rng.uniform(0, 0.5))
    run.finish()
    assert_same(run.path, unbroken())


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
    run.kill_when(lambda path: any(row["step"] == 5 for row in read_metrics(path)))
    run.finish()
    assert_same(run.path, whole.path)
