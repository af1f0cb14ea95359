"""Faults of the disk, against real processes: a cut checkpoint, no room. `make drills` runs them."""

import shutil
import subprocess
import sys

import pytest
from drill_runs import Run, assert_same, complaint, config, environment, unbroken

from pgjax.train.checkpoints import SIZES, Checkpoints

pytestmark = pytest.mark.drill
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]


def test_a_cut_checkpoint_is_named_and_the_one_before_is_taken_when_asked_for(tmp_path):
    run = Run(tmp_path, config())
    shutil.copytree(unbroken(), run.path)
    (run.path / "summary.json").unlink()
    *_, before, newest = steps = Checkpoints(run.path / "checkpoints").steps()
    files = [file for file in (run.path / "checkpoints" / str(newest)).rglob("*") if file.is_file() and file.name != SIZES]
    largest = max(files, key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    said = complaint(run.start(), 2)
    assert f"checkpoints/{newest} is damaged" in said and largest.name in said and f"--from {before}" in said
    assert f"no checkpoint of that step; there are: {steps}" in complaint(run.start("--from", str(newest + 1)), 2)
    assert Checkpoints(run.path / "checkpoints").latest() == newest  # nothing is dropped unasked
    run.finish("--from", str(before))
    assert_same(run.path, unbroken())


def test_a_full_disk(tmp_path):
    """The run says what it could not write and ends; given room, it goes on to the same end."""
    if not shutil.which("unshare") or subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False).returncode:
        pytest.skip("needs mounts of its own, for a disk of its own")
    size = sum(file.stat().st_size for file in unbroken().rglob("*") if file.is_file())
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    runs.mkdir()
    pgjax = f"{sys.executable} -m pgjax.cli train {config()} --runs {runs}"
    script = f"mount -t tmpfs -o size={int(size * 0.6)} none {runs}; {pgjax}; status=$?; cp -r {runs} {kept}; exit $status"
    command = [*OWN_MOUNTS, "sh", "-c", script]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, told = process.communicate(timeout=300)
    [said] = [line for line in told.splitlines() if line.startswith("pgjax: ")]  # what tensorstore's threads still print stands around it
    assert process.returncode == 1 and "No space left on device" in said and "make room" in said and str(runs) in said
    run = Run(kept, config())
    assert not list(run.path.rglob("*.part"))
    run.finish()
    assert_same(run.path, unbroken())
