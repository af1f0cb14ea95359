"""The benchmarks in their short forms: what they compare must agree. No time is asserted but that it is one."""

import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_qwen import QUICK

from pgjax.config import MeshConfig
from pgjax.train.flops import matmul_weights

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


@pytest.fixture
def quick(monkeypatch):
    """Programs that take less time to compile, and more to run; those that modules make when they are imported stay as they are."""
    import floor  # noqa: F401
    import grouped  # noqa: F401

    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))


def test_grouped(quick):
    import grouped
    from lengths import quantiles

    from pgjax.generate.law import answer_keys

    P, T, G, R = 2, 24, 3, 8
    rows = grouped.measure("tiny", lengths=[T], groups=[G], limit=R, prompts=P, repeats=1)  # raises where the layouts disagree
    keys = answer_keys(jax.random.key(0), 0, np.arange(P, dtype=np.uint32), G).reshape(-1)
    law = quantiles("lognormal", R)
    response = sum(int(law[jax.random.randint(key, (), 0, len(law))]) for key in keys)  # what decoding was to give
    assert [row["phase"] for row in rows] == ["prefill + decode", "update"]
    for row in rows:
        assert (row["T"], row["G"], row["R"]) == (T, G, R) and row["time_ratio"] == row["repeated_s"] / row["grouped_s"] > 0
        assert row["token_ratio"] == (P * G * T + response) / (P * T + response) and row["memory_ratio"] > 1
    assert grouped.gap([np.array([1.0, -4.0])], [np.array([1.0, -3.0])]) == 0.25


def test_floor(quick):
    import floor
    from tiny_recipe import tiny_recipe

    recipe = dataclasses.replace(tiny_recipe(), mesh=MeshConfig(), devices=0)
    rows, notes = floor.measure(recipe, steps=1)
    assert [row["phase"] for row in rows] == [*floor.PHASES, "whole step"]
    for row in rows:
        assert row["seconds"] > 0 and (
            row["ratio"] == row["seconds"] / row["floor_seconds"] if row["phase"] != "reward" else not row["ratio"]
        )
    *phases, whole = rows
    assert whole["floor_seconds"] == sum(row["floor_seconds"] for row in phases)
    assert whole["seconds"] == pytest.approx(sum(row["seconds"] for row in phases))
    assert notes["matmul_rate"] > 0 and notes["copy_rate"] > 0 and 1 <= notes["answer_tokens"] <= recipe.answer.max_tokens

    # Two prompts of 3 and 5 tokens, answers of 1 to 4 tokens, counted one by one; one lane a prompt, at rates of 1 a second.
    text, vision = recipe.model.text, recipe.model.vision
    prompt_P, length_PG = [3, 5], np.array([[1, 4], [2, 2]])
    image_PI = np.full((2, 2 * vision.window_patches), -1)
    image_PI[0, :3], image_PI[0, vision.window_patches : vision.window_patches + 2] = 0, 0  # one picture, in two windows
    batch = SimpleNamespace(length_P=np.array(prompt_P), image_PI=image_PI)
    one_lane = dataclasses.replace(recipe, rollout=dataclasses.replace(recipe.rollout, group=2, lanes=1, rows=0))
    found = floor.floors(one_lane, batch, length_PG, dict.fromkeys(floor.PHASES, 0.0), 1.0, 1e-3)
    inside = sum(t + 1 for T in prompt_P for t in range(T))
    behind = sum(T + r + 1 for T, lengths in zip(prompt_P, length_PG, strict=True) for n in lengths for r in range(n))
    each = 4 * text.heads * text.head_dim * text.layers
    tower = 4 * vision.width * (5**2 + 3**2 + 2**2)  # a block that sees the picture, and one that sees windows
    assert found["prefill"] == each * inside and found["encode"] == tower and found["reward"] == 0
    assert found["update"] == 3 * (each * (inside + behind) + tower) == 1.5 * found["score"]
    weights, cached = matmul_weights(recipe.model), 2 * text.kv_heads * text.head_dim * text.layers
    caches = sum(length_PG.sum(1) * prompt_P) + sum(r + 1 for n in length_PG.flat for r in range(n))
    assert found["decode"] == pytest.approx(4e3 * (5 * (weights.decoder + weights.head) + cached * caches))


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
