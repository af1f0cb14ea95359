"""What a run leaves: metrics that survive a kill, checkpoints on any mesh, progress for terminals and logs."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pgjax.config import Recipe
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.progress import Progress, duration
from pgjax.train.run_folder import RunFolder, read_config, read_metrics


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


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    with RunFolder(tmp_path, Recipe()) as run:
        for step in range(1, 6):
            run.log(step, {"reward": step})
            run.samples(step, [])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    with RunFolder(tmp_path, Recipe(), resume_step=3) as run:
        run.log(4, {"reward": 40})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert sorted(file.stem for file in (tmp_path / "samples").iterdir()) == ["1", "2", "3"]
    RunFolder(tmp_path, Recipe()).close()
    assert read_metrics(tmp_path) == [] and not list((tmp_path / "samples").iterdir())


def test_other_processes_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", Recipe(), write=False) as run:
        run.log(1, {"reward": 1})
        run.samples(1, [{}])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="not a run folder"):
        read_config(tmp_path)


def mesh(*shape):
    size = int(np.prod(shape))
    if jax.device_count() < size:
        pytest.skip(f"needs {size} devices; run with XLA_FLAGS=--xla_force_host_platform_device_count={size}")
    devices = np.array(jax.devices()[:size]).reshape(shape)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("before, after", [((1, 1), (1, 1)), ((4, 1), (1, 2))])
def test_checkpoints_move_between_meshes(tmp_path, before, after):
    def state(on):
        weights = jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(on, PartitionSpec("fsdp", "tensor")))
        return {"params": {"w": weights}, "step": jax.device_put(jnp.int32(3), NamedSharding(on, PartitionSpec()))}

    saved = state(mesh(*before))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, saved)
    assert checkpoints.steps() == [2, 3] and checkpoints.latest() == 3
    target = state(mesh(*after))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
    got = checkpoints.restore(abstract)
    assert got["params"]["w"].sharding == target["params"]["w"].sharding
    np.testing.assert_array_equal(got["params"]["w"], saved["params"]["w"])
    with pytest.raises(ValueError, match="checkpoint 9 not found.*2, 3"):
        checkpoints.restore(abstract, 9)
    with pytest.raises(ValueError, match="does not fit this recipe"):
        checkpoints.restore({"params": {"other": abstract["params"]["w"]}, "step": abstract["step"]})
    with pytest.raises(ValueError, match="does not fit this recipe.*shape"):
        checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), abstract))
    checkpoints.rewind(2)
    assert checkpoints.steps() == [2]
    checkpoints.save(2, saved)  # there already
    checkpoints.rewind()
    assert checkpoints.latest() is None
    checkpoints.close()


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
