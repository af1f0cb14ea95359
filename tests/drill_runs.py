"""What drills share: a recipe of six steps, real processes that run it, and the run that nobody disturbed."""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from tiny_encoder import tiny_encoder
from tiny_qwen import QUICK
from tiny_recipe import tiny_recipe

from pgjax.config import MeshConfig, Recipe
from pgjax.parallel.mesh import make_mesh
from pgjax.recipes import to_json, validate
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import read_config, read_metrics
from pgjax.train.setup import make_setup
from pgjax.train.update import TrainState, make_optimizer

STOPPED = 143  # exit status after SIGTERM

# `pgjax` with one of the trainer's programs under fire: a moment after the given call of it has begun, the process kills itself.
UNDER_FIRE = """
import itertools, os, signal, sys, threading
from pgjax import cli
from pgjax.grpo.programs import Programs

name, call, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
made = Programs.__init__

def init(self, *args):
    made(self, *args)
    program, calls = getattr(self, name), itertools.count(1)

    def under_fire(*args, **options):
        if next(calls) == call:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return program(*args, **options)

    setattr(self, name, under_fire)

Programs.__init__ = init
sys.exit(cli.main(sys.argv[4:]))
"""


def recipe(embedder: Path) -> Recipe:
    """Six steps on two devices; a checkpoint every two, of which two stay, and validation every three: they meet at the end only.

    Constrained answers parse, so that an untrained model has rewards to learn from; a tiny encoder saves seconds at every start.
    """
    tiny = tiny_recipe()
    grpo = replace(tiny.grpo, steps=6, checkpoint_every=2, validate_every=3, keep_checkpoints=2)
    rollout = replace(tiny.rollout, constrained=True, packed_step=0.0)
    warm_up = replace(tiny.warm_up, steps=3)
    reward = replace(tiny.reward, variant="published", embedder=str(embedder))
    return validate(
        replace(tiny, name="drill", devices=2, mesh=MeshConfig(1, 2, 1), rollout=rollout, reward=reward, warm_up=warm_up, grpo=grpo)
    )


def environment() -> dict[str, str]:
    """Of a process that sets for itself what conftest.py sets for its own, and compiles fast."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    return kept | {"XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in QUICK.items())}


@dataclass(frozen=True)
class Run:
    """A folder of runs with the recipe's run in it, and the process that works on it."""

    root: Path
    config: Path
    command: str = "train"

    @property
    def path(self) -> Path:
        return self.root / "drill"

    def start(self, *options: str, fire: tuple[str, int, float] | None = None) -> subprocess.Popen:
        command = ["-m", "pgjax.cli"] if fire is None else ["-c", UNDER_FIRE, *map(str, fire)]
        arguments = [sys.executable, *command, self.command, str(self.config), "--runs", str(self.root), *options]
        return subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(self, *options: str) -> str:
        """Lets the run go on to its end; what it said on stderr."""
        process = self.start(*options)
        _, said = process.communicate()
        assert process.returncode == 0, said
        return said

    def kill_in(self, program: str, call: int, delay: float) -> None:
        """Kills the run so many seconds after the given call of a program has begun."""
        process = self.start(fire=(program, call, delay))
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said

    def kill_when(self, seen: Callable[[Path], object]) -> None:
        """Kills the run as soon as something is seen in its folder."""
        process = self.start()
        while not seen(self.path):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """What it said on stdout and stderr."""
    said = process.communicate(timeout=600)
    assert process.returncode == status, said
    return said


def wait(process: subprocess.Popen, run: Run, steps: int, phase: str = "train") -> None:
    """Until so many steps have been logged, the last of them since now."""
    file, began = run.path / "metrics.jsonl", time.time()
    while not (file.exists() and file.stat().st_mtime > began and sum(r["phase"] == phase for r in read_metrics(run.path)) >= steps):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def assert_saved(run: Run, said: str) -> int:
    """One line says which step was saved before the end."""
    saved = Checkpoints(run.path / "checkpoints").latest()
    assert saved and said.count(f"saved after step {saved};") == 1, said
    return saved


def complaint(process: subprocess.Popen, status: int) -> str:
    """The one line of ours in which it said what is wrong, last."""
    _, said = process.communicate(timeout=300)
    lines = [line for line in said.splitlines() if line.startswith("pgjax: ")]
    assert process.returncode == status and lines == said.splitlines()[-1:], said
    return lines[0]


def lasting(rows: list[dict]) -> list[dict]:
    """Metrics without what times say, or how warm the process was."""
    return [{name: value for name, value in row.items() if not name.startswith(("perf/", "timing_s/"))} for row in rows]


def names(path: Path) -> list[str]:
    """Everything in a run folder but the insides of checkpoints and the event file, whose name holds the time."""
    found = [file.relative_to(path) for file in path.rglob("*") if file.parent.name != "tensorboard"]
    return sorted(str(name) for name in found if name.parts[0] not in ("checkpoints", "reference") or len(name.parts) <= 2)


def final_state(path: Path) -> TrainState:
    r = read_config(path)
    setup = make_setup(r.model, make_mesh(r.mesh, jax.devices()[: r.devices]))
    stage = r.sft if r.data.name == "rewriter" else r.grpo
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    return Checkpoints(path / "checkpoints").restore(setup.abstract_state(optimizer))


def assert_same(broken: Path, unbroken: Path) -> None:
    assert lasting(read_metrics(broken)) == lasting(read_metrics(unbroken))
    assert names(broken) == names(unbroken)
    for file in (*unbroken.glob("evaluation.json"), *unbroken.glob("samples/*")):
        assert (broken / file.relative_to(unbroken)).read_bytes() == file.read_bytes()
    summaries = [json.loads((path / "summary.json").read_text()) | {"seconds": 0} for path in (broken, unbroken)]
    assert summaries[0] == summaries[1]
    jax.tree.map(np.testing.assert_array_equal, final_state(broken), final_state(unbroken))


def write_config(folder: Path, recipe: Recipe) -> Path:
    path = folder / "drill.py"
    path.write_text(f"from pgjax.recipes import from_json\n\nrecipe = from_json({to_json(recipe)!r})\n")
    return path


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def config() -> Path:
    return write_config(folder(), recipe(tiny_encoder(folder())))


@functools.cache
def unbroken() -> Path:
    """The run that nobody disturbed."""
    run = Run(folder() / "unbroken", config())
    run.finish()
    rewards = [row["critic/rewards/mean"] for row in read_metrics(run.path) if row["phase"] == "train"]
    assert len(rewards) == len(set(rewards)) == 6, "a run that learns nothing would prove little"
    return run.path
