"""Drills of several real processes: equal to one, one of them killed, and SIGTERM. `make drills` runs them."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drill_runs import STOPPED, Run, assert_same, assert_saved, config, environment, finish, lasting, unbroken, wait, write_config
from toy_lessons import tiny_rewriter, write_lessons

from pgjax.config import MeshConfig
from pgjax.recipes import validate
from pgjax.train.run_folder import read_metrics

pytestmark = pytest.mark.drill
LAUNCH = Path(__file__).parents[1] / "launch"


def start_all(run: Run) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2"]
    return [run.start(*flags, "--process", str(k)) for k in range(2)]


def launch(run: Run) -> subprocess.Popen:
    """Both of them by the script, as one process."""
    env = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(LAUNCH / "local.sh"), "2", run.command, str(run.config), "--runs", str(run.root)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_gone(process: subprocess.Popen, dead: int) -> None:
    """Within a minute, in one line besides the progress."""
    killed = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and process.returncode == 1
    lines = [line for line in said.splitlines() if not line.startswith(("evaluate", "train"))]
    assert len(lines) == 1 and f"process {dead} of 2 is gone" in lines[0] and "last checkpoint" in lines[0], said


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """Two processes that nobody disturbed, with a compilation cache of their own. One of them speaks."""
    run = Run(tmp_path_factory.mktemp("together"), config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGJAX_CACHE", str(run.root / "cache"))
        out, said = finish(launch(run))
    summary, _, last = out.rstrip().rpartition("\n")
    assert json.loads(summary)["reward_last"] and last == f"run: {run.path}" and said.count("train 6/6  done") == 1
    return run.path


def assert_close(several: Path, one: Path) -> None:
    """Metrics on the same mesh: equal samples and so equal rewards; what collectives add up differs in its order."""
    rows = [lasting(read_metrics(path)) for path in (several, one)]
    assert len({tuple((row["phase"], row["step"]) for row in of) for of in rows}) == 1
    for there, here in zip(*rows, strict=True):
        assert here.keys() == there.keys()
        for name in here.keys() - {"phase"}:
            np.testing.assert_allclose(there[name] or 0, here[name] or 0, rtol=1e-4, atol=1e-6, err_msg=f"{name} of step {here['step']}")


def test_two_processes_are_as_one(together):
    assert_close(together, unbroken())


def test_a_warm_step_compiles_nothing(together):
    compiled = {row["step"]: row["perf/compilations"] for row in read_metrics(together) if row["phase"] == "train"}
    assert compiled[1] > 0 and compiled[5] == compiled[6] == 0


def test_stopped_and_killed(together, tmp_path, monkeypatch):
    """SIGTERM, then process 0, on whom all depend, is killed: the rest of the run is as if nothing had been. No start of a program that
    has run before compiles it again."""
    cache = together.parent / "cache"
    monkeypatch.setenv("PGJAX_CACHE", str(cache))
    compiled, run = set(cache.rglob("*-cache")), Run(tmp_path, config())
    both = launch(run)
    wait(both, run, 1)
    both.terminate()
    saved = assert_saved(run, finish(both, STOPPED)[1])
    started = start_all(run)
    wait(started[0], run, saved + 1)
    started[0].kill()
    assert_gone(started[1], 0)
    started[0].communicate()
    finish(launch(run))
    assert_same(run.path, together)
    assert compiled and set(cache.rglob("*-cache")) == compiled


def test_processes_that_are_started_for_different_things(tmp_path):
    run = Run(tmp_path, config())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2"]
    first, odd = (run.start(*flags, "--process", str(k), *more) for k, more in enumerate(([], ["--seed", "7"])))
    assert "process 1 has another recipe than process 0" in finish(odd, 2)[1]
    assert_gone(first, 1)
    assert not run.path.exists()


WAITING = """
import sys, time
from pgjax.commands.start import start_jax
from pgjax.parallel.start import find_group, joined

group = find_group(sys.argv[1], 2, int(sys.argv[2]), simulated=True)
start_jax(1)
with joined(group):
    print("joined", flush=True)
    time.sleep(300)
"""


def test_the_death_of_another_is_seen():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", WAITING, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    both = [subprocess.Popen([*command, str(k)], **pipes) for k in range(2)]
    assert [process.stdout.readline() for process in both] == ["joined\n"] * 2
    both[1].kill()
    assert_gone(both[0], 1)
    both[1].communicate()


def test_sigterm_to_one_of_two_supervised(tmp_path):
    """Both save the same step, and up to it their numbers are those of one that was not stopped."""
    tiny = tiny_rewriter(write_lessons(tmp_path / "data"))
    sft = replace(tiny.sft, keep_checkpoints=2)
    file = write_config(tmp_path, validate(replace(tiny, name="drill", devices=2, mesh=MeshConfig(1, 2, 1), sft=sft)))
    whole, run = Run(tmp_path / "whole", file, "sft"), Run(tmp_path / "runs", file, "sft")
    whole.finish()
    started = start_all(run)
    wait(started[0], run, 1, "sft")
    started[1].terminate()
    (_, said), silent = [finish(process, STOPPED) for process in started]
    assert_saved(run, said)
    assert silent == ("", "")
    several, one = ({row["step"]: row for row in read_metrics(path) if row["phase"] == "sft"} for path in (run.path, whole.path))
    assert several
    for step, row in several.items():
        np.testing.assert_allclose(row["sft/loss"], one[step]["sft/loss"], rtol=1e-4)


def test_a_coordinator_that_is_not_there(tmp_path):
    code = "import sys; from pgjax import cli; from pgjax.parallel import start; start.JOIN_SECONDS = 5; sys.exit(cli.main(sys.argv[1:]))"
    flags = ["--runs", str(tmp_path), "--coordinator", "localhost:1", "--processes", "2", "--process", "1"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, "train", "toy", *flags], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1 and "localhost:1 within 5 s; this is number 1" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_one_that_fails_says_why_and_ends_all(tmp_path):
    """The first one cannot write: the other hears that it is gone."""
    (tmp_path / "drill").write_text("in the way of the run folder")
    started = start_all(Run(tmp_path, config()))
    (_, first), (_, second) = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [2, 1]
    assert first.startswith("pgjax: run ") and first.count("\n") == 1, first
    assert "process 0 of 2 is gone" in second and second.count("\n") == 1, second
