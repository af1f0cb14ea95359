"""A drill: `pgjax moderate --out` is killed with SIGKILL again and again, and its files end as if nobody had touched it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import make_run

pytestmark = pytest.mark.drill
ROWS, KILLS = 240, (5, 90, 150)  # lines that are there when a kill comes


def command(run: Path, file: Path, out: Path) -> list[str]:
    flags = ["--model", str(run), "--categories", "C1S1", "C8S1", "--jsonl", str(file), "--out", str(out), "--rows", "4"]
    return [sys.executable, "-m", "pgjax.cli", "moderate", *flags]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_batch_is_killed_and_goes_on(tmp_path):
    run, file, out = make_run(tmp_path / "tiny"), tmp_path / "in.jsonl", tmp_path / "out"
    rows = [{"id": k, "request": f"How do I clean vault number {k}?"} for k in range(ROWS)]
    rows[40], rows[100] = {"id": 40}, {"id": 100, "request": "vault " * 500}
    file.write_text("\n".join(map(json.dumps, rows)))
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    whole = tmp_path / "whole"
    subprocess.run(command(run, file, whole), env=environment, check=True, timeout=300)
    for lines in KILLS:
        process = subprocess.Popen(command(run, file, out), env=environment, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 300
        while not (out / "verdicts.jsonl").exists() or len((out / "verdicts.jsonl").read_text().splitlines()) < lines:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(out / "verdicts.jsonl", "a") as torn:
        torn.write('{"line": 239, "id"')  # as a kill leaves it in the middle of a write
    done = subprocess.run(command(run, file, out), env=environment, check=True, timeout=300, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"rows": ROWS, "judged": ROWS - 2, "errors": 2}
    for name in ("verdicts.jsonl", "errors.jsonl"):
        unbroken, broken = ({row["line"]: row for row in read(folder / name)} for folder in (whole, out))
        assert len(read(out / name)) == len(broken) and broken.keys() == unbroken.keys()
        for line, row in unbroken.items():
            assert row.get("request") == broken[line].get("request") and row.get("error") == broken[line].get("error")
