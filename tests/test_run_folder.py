"""What a run leaves: metrics that survive a kill, events that agree with them, progress for terminals and logs."""

import io
import json
import struct
from dataclasses import replace

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from pgjax.config import DataConfig, GRPOConfig, MeshConfig, OptimizerConfig, Recipe, ReportConfig, SFTConfig
from pgjax.train.progress import Progress, duration
from pgjax.train.run_folder import RunFolder, changed_keys, check_same_run, read_config, read_metrics, remove_run


def test_run_folder(tmp_path):
    recipe = Recipe(name="small", seed=7)
    with RunFolder(tmp_path / "run", recipe) as run:
        run.log(1, {"reward": jnp.float32(0.5), "loss": float("nan")})
        run.log(1, {"f1": 0.25}, phase="eval")
        run.samples(1, [{"id": "a", "reward": 1.0}])
        run.write_json("summary.json", {"seconds": 3})
    assert read_config(run.path) == recipe
    first = {"step": 1, "phase": "train", "reward": 0.5, "loss": None}
    assert read_metrics(run.path) == [first, {"step": 1, "phase": "eval", "f1": 0.25}]
    assert json.loads((run.path / "samples" / "1.jsonl").read_text()) == {"id": "a", "reward": 1.0}
    assert len(list((run.path / "tensorboard").glob("events.out.*"))) == 1
    assert not list(run.path.rglob("*.part"))


def events(path) -> list[tuple[str, int, float]]:
    """Tag, step and value of all scalars in all event files: records of length, checksum, event, checksum."""
    scalars = []
    for file in sorted((path / "tensorboard").glob("events.out.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return scalars


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    with RunFolder(tmp_path, Recipe()) as run:
        run.log(5, {"loss": 0.5}, "warm_up")
        for step in range(1, 6):
            run.log(step, {"reward": step, "nothing": float("nan")})
            run.samples(step, [])
        run.write_json("summary.json", {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    (tmp_path / "samples" / "6.jsonl.part").touch()
    with RunFolder(tmp_path, Recipe(), resume_step=3) as run:
        run.log(4, {"reward": 40})
    rows = read_metrics(tmp_path)
    assert rows[0] == {"step": 5, "phase": "warm_up", "loss": 0.5}, "the supervised stage has steps of its own"
    assert [(row["step"], row["reward"]) for row in rows[1:]] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert events(tmp_path) == [("warm_up/loss", 5, 0.5), *(("reward", row["step"], row["reward"]) for row in rows[1:])]
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["1.jsonl", "2.jsonl", "3.jsonl"]
    assert not (tmp_path / "summary.json").exists()
    RunFolder(tmp_path, Recipe()).close()
    assert read_metrics(tmp_path) == events(tmp_path) == list((tmp_path / "samples").iterdir()) == []


def with_grpo(**changes) -> Recipe:
    return Recipe(grpo=replace(Recipe().grpo, **changes))


def test_a_run_goes_on_as_it_was_started(tmp_path):
    check_same_run(tmp_path, Recipe())  # nothing there
    RunFolder(tmp_path, Recipe()).close()
    faster = with_grpo(optimizer=OptimizerConfig(learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"grpo.optimizer.learning_rate = 1e-06, now it is 0.001; .*--fresh"):
        check_same_run(tmp_path, faster)
    with pytest.raises(ValueError, match=r"seed = 0, now it is 3 \(and 1 more: grpo.optimizer.learning_rate\)"):
        check_same_run(tmp_path, replace(faster, seed=3))
    moved = replace(Recipe(), name="moved", devices=4, mesh=MeshConfig(data=4, fsdp=1), report=ReportConfig(show_content=True))
    check_same_run(tmp_path, replace(moved, sft=SFTConfig(micro_prompts=8, checkpoint_every=3, keep_checkpoints=9, keep_best=False)))
    check_same_run(tmp_path, replace(moved, grpo=GRPOConfig(micro_prompts=8, checkpoint_every=3, keep_checkpoints=9, keep_best=False)))


def test_a_run_may_be_prolonged_but_not_under_a_schedule(tmp_path):
    steps = Recipe().grpo.steps
    RunFolder(tmp_path, Recipe()).close()
    assert not changed_keys(tmp_path, with_grpo(steps=steps + 1))
    assert changed_keys(tmp_path, with_grpo(steps=steps - 1)) == {"grpo.steps": (steps, steps - 1)}
    cosine = OptimizerConfig(schedule="cosine")
    RunFolder(tmp_path, with_grpo(optimizer=cosine)).close()
    assert list(changed_keys(tmp_path, with_grpo(optimizer=cosine, steps=steps + 1))) == ["grpo.steps"]
    supervised = [replace(Recipe(), sft=SFTConfig(steps=n, optimizer=OptimizerConfig())) for n in (8, 9)]
    RunFolder(tmp_path, supervised[0]).close()
    assert not changed_keys(tmp_path, supervised[1])


def test_what_was_built_for_another_recipe_is_not_taken(tmp_path):
    """A run without a checkpoint starts over: with the recipe of its first start it keeps its data, with another it builds anew."""
    RunFolder(tmp_path, Recipe()).close()
    for changed in (Recipe(seed=1), Recipe(data=DataConfig(root="elsewhere"))):
        for name in ("data", "tokenizer"):
            (tmp_path / name).mkdir()
        RunFolder(tmp_path, read_config(tmp_path)).close()
        assert (tmp_path / "data").exists() and (tmp_path / "tokenizer").exists()
        RunFolder(tmp_path, changed).close()
        assert not (tmp_path / "data").exists() and not (tmp_path / "tokenizer").exists()


def test_only_run_folders_are_deleted(tmp_path):
    remove_run(tmp_path / "nowhere")
    RunFolder(tmp_path / "run", Recipe()).close()
    remove_run(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ValueError, match="notes is not a run folder"):
        remove_run(tmp_path / "notes")
    assert [file.name for file in tmp_path.iterdir()] == ["notes"] and (tmp_path / "notes" / "mine.txt").exists()


def test_other_processes_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", Recipe(), write=False) as run:
        run.log(1, {"reward": 1})
        run.samples(1, [{}])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="not a run folder"):
        read_config(tmp_path)


def test_progress_prints_plain_lines_off_a_terminal():
    out = io.StringIO()
    with Progress("train", 30, every=1e9, out=out) as progress:
        for step in range(1, 31):
            progress.update(step, reward=step / 10)
    lines = out.getvalue().splitlines()
    assert lines[0] == "train 0/30  starting" and lines[1].startswith("train 1/30  reward 0.1")
    assert lines[2].startswith("train 30/30  reward 3  0 s left") and "done after" in lines[3] and len(lines) == 4


def test_progress_says_that_it_was_stopped():
    out = io.StringIO()
    with pytest.raises(KeyError), Progress("train", 3, out=out):
        raise KeyError
    assert "train 0/3  stopped by KeyError" in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_live_on_a_terminal():
    out = Terminal()
    with Progress("warm-up", 2, out=out) as progress:
        progress.update(1, loss=2.5)
        progress.update(2, loss=1.5)
    assert "loss 1.5" in out.getvalue() and "2/2" in out.getvalue()
    quiet = io.StringIO()
    with Progress("train", 2, show=False, out=quiet) as progress:
        progress.update(1)
    assert quiet.getvalue() == ""


def test_duration():
    assert [duration(x) for x in (0.4, 59.6, 187, 7380)] == ["0 s", "1:00", "3:07", "2:03:00"]
