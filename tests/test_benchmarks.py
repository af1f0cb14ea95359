"""The benchmarks in their short forms: what they compare must agree. No time is asserted but that it is one."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_qwen import QUICK

from pgjax.config import MeshConfig
from pgjax.recipes import load_recipe
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


def test_data_pipeline():
    import data_pipeline

    recipe = dataclasses.replace(load_recipe("toy"), tokenizer_vocab=1024)
    recipe = data_pipeline.with_data(recipe, train_examples=96, eval_examples=2)
    one, two = data_pipeline.measure(recipe, buckets=[1, 2], workers=[2], prompts=16, most=3)[0]
    assert (one["buckets"], two["buckets"]) == (1, 2) and one["padding"] > two["padding"] > 0 and one["MB"] > two["MB"] > 0
    assert all(row[name] > 0 for row in (one, two) for name in data_pipeline.HEAD)


@pytest.fixture
def quick(monkeypatch):
    """Programs that take less time to compile, and more to run; those that modules make when they are imported stay as they are."""
    import accelerator  # noqa: F401
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
    loss = dataclasses.replace(recipe.grpo.loss, kl_in_reward=0.0)
    grpo = dataclasses.replace(recipe.grpo, mini_prompts=recipe.grpo.prompts, micro_prompts=recipe.grpo.prompts, loss=loss)
    recipe = dataclasses.replace(recipe, grpo=grpo)  # one update a step: the reference alone is scored
    rows, notes = floor.measure(recipe, "lognormal", steps=1, matmul=1e9, copy=1e9)
    assert [row["phase"] for row in rows] == [*floor.PHASES, "whole step"]
    for row in rows:
        assert row["seconds"] > 0 and (
            row["ratio"] == row["seconds"] / row["floor_seconds"] if row["phase"] != "reward" else not row["ratio"]
        )
    *phases, whole = rows
    assert whole["floor_seconds"] == sum(row["floor_seconds"] for row in phases)
    assert whole["seconds"] == pytest.approx(sum(row["seconds"] for row in phases))
    assert all(rate > 0 for rate in floor.rates("float32", 1 << 20)) and 1 <= notes["answer_tokens"] <= recipe.answer.max_tokens

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
    assert found["update"] == 3 * (each * (inside + behind) + tower) == 3 * found["score"]
    weights, cached = matmul_weights(recipe.model), 2 * text.kv_heads * text.head_dim * text.layers
    caches = sum(length_PG.sum(1) * prompt_P) + sum(r + 1 for n in length_PG.flat for r in range(n))
    assert found["decode"] == pytest.approx(4e3 * (5 * (weights.decoder + weights.head) + cached * caches))


@pytest.mark.parity
def test_vs_trl(monkeypatch):
    pytest.importorskip("trl")
    import vs_trl

    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    rows, notes = vs_trl.measure("tiny", policy=40, steps=1, threads=1)  # raises where the two do not run the same model
    assert 0 < notes["logprob_gap"] < 1e-5 and notes["attention"] in ("eager", "sdpa") and notes["torch_threads"] == 1
    assert [row["phase"] for row in rows] == [*vs_trl.PHASES, "first step, with compilation"]
    for row in rows:
        assert row["ours_s"] > 0 and row["trl_s"] > 0 and row["ratio"] == row["trl_s"] / row["ours_s"]
    whole = {side: rows[4][side] for side in ("ours_s", "trl_s")}
    assert all(sum(row[side] for row in rows[:4]) == pytest.approx(whole[side]) for side in whole)  # phases leave nothing out


def test_accelerator(quick, monkeypatch, tmp_path, capsys):
    import accelerator
    from lengths import quantiles

    from pgjax.generate.law import answer_keys

    P, T, G, R = 2, 24, 3, 8
    out, sizes = tmp_path / "runs" / "lines.jsonl", accelerator.Sizes(P, T, G, R, 0, "attention")
    arguments = f"--models tiny --prompts {P} --T {T} --G {G} --R {R} --repeats 1 --json --out {out}"
    monkeypatch.setattr(accelerator, "rates", lambda dtype, size: (1e12, 1e11))
    monkeypatch.setattr(accelerator, "peak", lambda device: 1e10)

    def run(command, **_):  # the process of a side
        with monkeypatch.context() as its_own:
            its_own.setattr(sys, "argv", command[1:])
            try:
                accelerator.main()
            except ModuleNotFoundError:  # torch
                return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    def rows() -> dict[str, dict]:
        accelerator.main()
        return {row["phase"]: row for row in json.loads(capsys.readouterr().out)["rows"]}

    monkeypatch.setattr(accelerator, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *arguments.split()])
    found = rows()
    assert all(0 < found.pop(f"attention, {dtype}")["ratio"] < 1 for dtype in accelerator.ALLOWED)
    assert (*found,) == accelerator.MEASURED and not any(row["note"] for row in found.values())

    keys = answer_keys(jax.random.key(0), 0, np.arange(P, dtype=np.uint32), G).reshape(-1)
    law = quantiles("lognormal", R)
    response = sum(int(law[jax.random.randint(key, (), 0, len(law))]) for key in keys)
    assert [row["tokens"] for row in found.values()] == [P * T, response, 2 * (P * T + response), *2 * [P * T + response]]
    weights = matmul_weights(accelerator.MODELS["tiny"][0])
    forward = 2 * weights.decoder * (P * T + response) + 2 * weights.head * response
    flops = {"prefill": 2 * weights.decoder * P * T, "score": 2 * forward, "update": 3 * forward}
    for phase, row in found.items():
        assert row["seconds"] > 0 and row["ratio"] == row["seconds"] / row["floor_s"] and row["trained"] == "decoder"
        assert phase not in flops or row["mfu"] == pytest.approx(flops[phase] / row["seconds"] / 1e10)
        assert row["tokens_per_s"] == row["tokens"] / row["seconds"] and row["target"] == accelerator.TARGETS.get(phase)
    assert found["whole step"]["floor_s"] == pytest.approx(sum(found[phase]["floor_s"] for phase in accelerator.MEASURED[:-1]))
    if importlib.util.find_spec("torch"):
        assert all(found[phase]["torch_rows"] == P * G for phase in accelerator.MEASURED[:-1])
        assert all(row["torch_s"] > 0 and row["torch_ratio"] == row["torch_s"] / row["seconds"] for row in found.values())
        assert found["whole step"]["torch_s"] == pytest.approx(sum(found[phase]["torch_s"] for phase in accelerator.MEASURED[:-1]))

    # What is there is not measured again; what fails is told, and leaves the rest.
    monkeypatch.setattr(accelerator, "make_setup", None)
    again = rows()
    assert found.items() <= again.items()
    out.write_text("".join(line for line in out.read_text().splitlines(True) if '"update"' not in line))
    log = accelerator.Log(out, side="ours", model="tiny", device=jax.devices()[0].device_kind, **sizes._asdict())
    log.measure("update", lambda: 1 / 0)
    broken = {row["phase"]: row for row in accelerator.table(out, {"tiny": sizes})}
    assert broken["update"]["seconds"] is broken["whole step"]["torch_s"] is None and broken["decode"] == found["decode"]
    assert broken["update"]["note"] == "pgjax: ZeroDivisionError: division by zero"
    assert accelerator.table(out, {"tiny": sizes._replace(T=T + 1)})[-1]["seconds"] is None

    # Attention that lets answers see each other, and one that gives no numbers, are seen to be wrong.
    text, right = accelerator.MODELS["tiny"][0].text, accelerator.attention
    for wrong in (lambda *qkv, segments: right(*qkv, segments.replace(sample=0 * segments.sample)), lambda q, *_, segments: q * np.nan):
        monkeypatch.setattr(accelerator, "attention", lambda *args, wrong=wrong: wrong(*args[:3], segments=args[3]))
        assert not accelerator.check_attention(text, "float32")["ratio"] <= 1


def test_accelerator_imports():
    """Beside an accelerator there may be jax, torch and little else."""
    absent = ["tyro", "grain", "tensorflow_datasets", "tensorboardX", "orbax", "array_record", "PIL", "peft", "trl", "datasets"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import accelerator; assert 'peers' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS.parent)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parity
def test_peers():
    torch = pytest.importorskip("torch")
    import accelerator
    import peers

    T, length_B = 5, np.array([4, 2, 1])
    tokens_BS = np.random.default_rng(0).integers(0, 256, (3, T + 4))
    peer = peers.Peer(accelerator.MODELS["tiny"][0].text, tokens_BS, length_B, T, lora_rank=2)
    with torch.no_grad():
        logp_BSV = peer.model(torch.tensor(tokens_BS)).logits.float().log_softmax(-1)
        counted = [(b, T + r) for b, n in enumerate(length_B) for r in range(n)]
        logp = sum(float(logp_BSV[b, s - 1, tokens_BS[b, s]]) for b, s in counted)
        assert float(peer._nll(slice(0, 3))) == pytest.approx(-logp, rel=0.01)
    parts = []

    def run(part: slice):
        parts.append(part)
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("too much")

    assert peer._measured(run, 16)["torch_rows"] == 1
    assert parts == [slice(0, 3), *(slice(n, n + 1) for n in (0, 0, 1, 2))]
    assert peer._measured(lambda part: 1e6, 16)["seconds"] < 0 < peer.decode()["seconds"]
    assert peer.backward()["seconds"] > 0
    assert {name.rpartition(".")[2] for name, p in peer.model.named_parameters() if p.grad is not None} == {"up", "down"}
    assert {type(layer.mlp.gate_proj) for layer in peer.model.model.layers} == {peers.Adapted}


def test_timing(capsys):
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


def test_trace():
    import trace_step

    op = lambda program, begin, end: {"ph": "X", "ts": begin * 1e6, "dur": (end - begin) * 1e6, "args": {"hlo_module": program}}  # noqa: E731
    events = [op("jit_a", 1, 2), op("jit_a", 1.5, 3), op("jit_b", 2.5, 4), op("jit_b", 5, 6), op("jit_c", 6, 6.5), {"ph": "M", "name": "x"}]
    assert trace_step.summarise(events) == [
        {"program": "a", "begins_s": 0, "busy_s": 2, "gap_s": 0},
        {"program": "b", "begins_s": 1.5, "busy_s": 2.5, "gap_s": 1},
        {"program": "c", "begins_s": 5, "busy_s": 0.5, "gap_s": 0},
        {"program": "all", "begins_s": 0, "busy_s": 4.5, "gap_s": 1},
    ]
    with pytest.raises(ValueError, match="no operation"):
        trace_step.summarise(events[-1:])
