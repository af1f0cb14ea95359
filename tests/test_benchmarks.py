"""The benchmarks in their short forms: what they compare must agree. No time is asserted but that it is one."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def test_rewards():
    import rewards

    rows = rewards.measure(answers=64, group=8, repeats=1)  # raises where a path's rewards differ
    kinds = ["strings", "pgjax", "pgjax, arrays alone"]
    assert [row["path"] for row in rows] == [kind + end for end in ("", ", no embedder") for kind in kinds]
    assert all(row["answers"] == 64 and row["group"] == 8 and row["samples_per_s"] > 0 for row in rows)
    for strings, *ours in (rows[:3], rows[3:]):
        assert strings["ratio"] == 1 and all(r["ratio"] == r["samples_per_s"] / strings["samples_per_s"] for r in ours)


def test_rollout():
    import lengths
    import rollout

    P, G, R = 16, 4, 64
    sizes = dict(prompts=P, group=G, limit=R, mean=20, micro=[8, 16])
    rows = rollout.measure(rows=[8, P], lanes=[G], shards=[1, 8], **sizes)  # raises where tokens and used slots differ in number
    assert len(rows) == len(lengths.LAWS) * 2 * 2
    for row in rows:
        assert row["mean"] <= row["max"] <= R and row["static_waste"] == row["max"] / row["mean"]
        assert 1 <= row["waste_before_tail"] and 1 <= row["waste"] and all(0 <= row[f"pad_share, micro {n}"] < 1 for n in (8, 16))
        if row["rows"] == P:  # every answer has its own lane, as in a static loop
            assert row["waste"] == pytest.approx(row["static_waste"])
    assert all(row["waste"] == 1 for row in rows if row["law"] == "equal")
    # With one row all tokens go through its one lane, one after the other.
    assert {row["waste"] for row in rollout.measure(rows=[1], lanes=[1], shards=[1], **sizes)} == {1}

    for law in lengths.LAWS:
        drawn = lengths.quantiles(law, 1024)
        assert drawn.mean() == pytest.approx(300, abs=0.6) and 1 <= drawn.min() and drawn.max() <= 1024 and (np.diff(drawn) >= 0).all()


@pytest.mark.parity
def test_vs_trl(monkeypatch):
    pytest.importorskip("trl")
    import vs_trl

    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    rows, notes = vs_trl.measure("tiny", steps=1, threads=1)  # raises where the two do not run the same model
    assert 0 < notes["logprob_gap"] < 1e-5 and notes["attention"] in ("eager", "sdpa") and notes["torch_threads"] == 1
    assert [row["phase"] for row in rows] == [*vs_trl.PHASES, "first step, with compilation"]
    for row in rows:
        assert row["ours_s"] > 0 and row["trl_s"] > 0 and row["ratio"] == row["trl_s"] / row["ours_s"]
    whole = {side: rows[4][side] for side in ("ours_s", "trl_s")}
    assert all(sum(row[side] for row in rows[:4]) == pytest.approx(whole[side]) for side in whole)  # phases leave nothing out


def test_timing(capsys):
    import json

    import timing

    rows = [{"what": "a", "seconds": 0.123456, "n": 3}, {"what": "b", "seconds": 2.0, "n": 40000}]
    timing.show(rows, True, "Title")
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == rows and found["machine"]["cores"] > 0 and found["machine"]["jax"] == jax.__version__
    timing.show(rows, False, "Title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Title" and lines[-2:] == ["| a | 0.1235 | 3 |", "| b | 2 | 40000 |"]
    calls = []
    assert timing.median_seconds(lambda: calls.append(1), repeats=3, warm_up=2) > 0 and len(calls) == 5
