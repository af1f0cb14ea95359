"""Training checkpoints: on any mesh, the newest and the best kept, nothing half-written or half-deleted taken for whole."""

import errno
import json
import os
import shutil
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny_recipe import tiny_recipe

from pgjax.grpo.trainer import train
from pgjax.train.checkpoints import SIZES, Checkpoints, go_back
from pgjax.train.run_folder import RunFolder

STATE = {"w": jnp.arange(4.0)}


def mesh(*shape):
    size = int(np.prod(shape))
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
    checkpoints.save(3, saved)  # there already
    checkpoints.clear()
    assert checkpoints.latest() is None
    checkpoints.close()


def test_the_best_is_kept_beside_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.best() is None
    for step, score in enumerate([None, 0.5, 0.7, 0.7, 0.1, None, 0.2, 0.0]):
        checkpoints.save(step, STATE, score)
    assert checkpoints.steps() == [3, 6, 7] and checkpoints.best() == 3, "the newest of two equals, and the two newest"
    again = Checkpoints(tmp_path, keep=1)
    assert again.steps() == [3, 7] and again.best() == 3
    again.save(8, STATE, 0.9)
    assert again.steps() == [8] and again.best() == 8


def test_reading_beside_a_run_changes_nothing(tmp_path):
    Checkpoints(tmp_path / "nowhere").close()
    assert not (tmp_path / "nowhere").exists()
    writer = Checkpoints(tmp_path / "run", keep=5)
    for step in range(3):
        writer.save(step, STATE)
    unfinished = tmp_path / "run" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "run" / "2", unfinished)
    reader = Checkpoints(tmp_path / "run")
    assert reader.steps() == [0, 1, 2] and unfinished.exists()
    np.testing.assert_array_equal(reader.restore(STATE)["w"], STATE["w"])
    reader.close()
    Checkpoints(tmp_path / "run", keep=5).save(4, STATE)
    assert sorted(folder.name for folder in (tmp_path / "run").iterdir()) == ["0", "1", "2", "4"], "the next writer clears away"


def test_a_deletion_that_was_cut_short_is_brought_to_its_end(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in range(3):
        checkpoints.save(step, STATE, score=-step)
    for part in ("default", "_CHECKPOINT_METADATA"):  # step 0, the best, would stay for ever if its score were still read
        path = tmp_path / "1" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Checkpoints(tmp_path, keep=1).steps() == [0, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room(number, tmp_path):
    """Orbax says it in a ValueError of several lines."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    said = ValueError(f"INTERNAL: cannot write\n[OS error {number}: {os.strerror(number)}]")
    with mock.patch.object(checkpoints._manager, "save", side_effect=said), pytest.raises(OSError) as error:
        checkpoints.save(3, STATE)
    assert error.value.errno == number and error.value.filename == str(tmp_path / "3")


# --- the run that goes on from them --------------------------------------------------------------------------------------------


def stopped(path, step: int):
    """The tiny run's folder as it lies after `step` steps, with checkpoints of nothing."""
    recipe = replace(tiny_recipe(), devices=8)
    RunFolder(path, recipe).close()
    for name, number in (("checkpoints", step), ("reference", 0)):
        checkpoints = Checkpoints(path / name, keep=1)
        checkpoints.save(number, STATE)
        checkpoints.close()
    return recipe


def test_a_run_that_has_ended_only_says_so(tmp_path, capsys):
    recipe = stopped(tmp_path, tiny_recipe().grpo.steps)
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 7.0}))
    before = sorted(tmp_path.rglob("*"))
    assert train(recipe, tmp_path) == {"seconds": 7.0}
    assert "has ended after 3 steps" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_another_recipe_does_not_go_on_with_a_run(tmp_path):
    recipe = stopped(tmp_path, 2)
    config = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="was started with seed = 0, now it is 1"):
        train(replace(recipe, seed=1), tmp_path)
    assert (tmp_path / "config.json").read_text() == config and not (tmp_path / "data").exists()


def test_a_file_that_was_cut_or_lost_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, STATE)
    largest = max(
        (file for file in (tmp_path / "3").rglob("*") if file.is_file() and file.name != SIZES), key=lambda file: file.stat().st_size
    )
    whole, name = largest.read_bytes(), str(largest.relative_to(tmp_path / "3"))
    largest.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"3 is damaged: its file {name} has {len(whole) - 1} bytes instead of {len(whole)}; `--from 2`"):
        checkpoints.restore(STATE)
    largest.unlink()
    with pytest.raises(ValueError, match=f"its file {name} is gone"):
        checkpoints.restore(STATE)
    largest.write_bytes(whole)
    assert checkpoints.restore(STATE)["w"].tolist() == [0, 1, 2, 3]
    shutil.rmtree(tmp_path / "2"), shutil.rmtree(tmp_path / "1")
    largest.unlink()
    with pytest.raises(ValueError, match="with none before it, `--fresh` starts over"):
        Checkpoints(tmp_path).restore(STATE)


def test_going_back_drops_later_ones(tmp_path):
    for step in (1, 2, 3):
        Checkpoints(tmp_path, keep=3).save(step, STATE)
    with pytest.raises(ValueError, match=r"--from 4: .* there are: \[1, 2, 3\]"):
        go_back(tmp_path, 4)
    file = next(file for file in (tmp_path / "2").rglob("*") if file.is_file() and file.name != SIZES and file.stat().st_size)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="2 is damaged: .*`--from 1`"):
        go_back(tmp_path, 2)
    assert Checkpoints(tmp_path).steps() == [1, 2, 3], "nothing is lost for a step that does not do"
    file.write_bytes(whole)
    go_back(tmp_path, 2)
    assert Checkpoints(tmp_path).steps() == [1, 2]
    with pytest.raises(ValueError, match="there are: none"):
        go_back(tmp_path / "nowhere", 1)
