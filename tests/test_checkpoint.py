"""Checkpoints in and out: names and shapes of transformers, bits unchanged, errors that say what to do."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_qwen import abstract_params, build, golden, tiny_model

from pgjax.config import MeshConfig
from pgjax.models import checkpoint
from pgjax.models.checkpoint import canonical, load_params, save_params
from pgjax.models.hf_config import config_from_hf
from pgjax.parallel.mesh import make_mesh


@pytest.fixture(scope="module", params=["tied", "untied", "qwen3"])
def saved(request, tmp_path_factory):
    """A golden case: its arrays, the directory that it was read from, its parameters, and where they were saved again."""
    arrays, source, target = golden(request.param), tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    model, params = build(arrays, source)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_params(target, params, model.config)
    return arrays, source, params, target


def test_names_and_shapes_are_those_of_transformers(saved):
    arrays, _, params, target = saved
    written = load_file(target / "model.safetensors")
    assert {name: list(x.shape) for name, x in written.items()} == json.loads(str(arrays["shapes"]))
    assert ("lm_head" in params) == ("lm_head.weight" in written) == (not config_from_hf(target).text.tied)


def test_saving_and_loading_change_no_bit(saved):
    _, source, params, target = saved
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert all(np.array_equal(before[name].view(np.uint32), after[name].view(np.uint32)) for name in before)
    again = load_params(target, *abstract_params(tiny_model(target)))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_several_files_make_one_checkpoint(saved, tmp_path):
    _, source, params, _ = saved
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    for part in range(2):
        save_file({n: x for i, (n, x) in enumerate(sorted(tensors.items())) if i % 2 == part}, tmp_path / f"model-{part}.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path, *abstract_params(tiny_model(tmp_path))))


def refused(path, model, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load_params(path, *abstract_params(model))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_broken_checkpoints_are_refused_in_one_line(saved, tmp_path):
    _, source, _, _ = saved
    model, tensors = tiny_model(source), load_file(source / "model.safetensors")
    file = tmp_path / "model.safetensors"
    refused(tmp_path, model, "no .safetensors file here; point to a Hugging Face checkpoint directory")

    name = next(n for n in tensors if n.endswith("layers.1.self_attn.k_proj.weight"))
    save_file({n: x for n, x in tensors.items() if n != name}, file)
    refused(tmp_path, model, f"1 missing: {canonical(name)}$")

    save_file({n: x for n, x in tensors.items() if "visual" not in n}, file)
    refused(tmp_path, model, r"\d+ missing: visual.* \.\.\.$")

    # As many numbers, but turned; one missing and one too many: all at once.
    other = next(n for n in tensors if n.endswith("layers.0.mlp.down_proj.weight"))
    rest = {n: x for n, x in tensors.items() if n != name} | {
        other: np.ascontiguousarray(tensors[other].T),
        "model.more.weight": tensors[name],
    }
    save_file(rest, file)
    shape = tensors[other].shape
    says = f"1 missing: {canonical(name)}; 1 surplus: model.more.weight; 1 misshapen: {canonical(other)} {shape[::-1]} instead of {shape}"
    refused(tmp_path, model, re.escape(says))

    save_file({n: x.astype(np.int32) for n, x in tensors.items()}, file)
    refused(tmp_path, model, "has type I32; BF16, F16, F32 are read")

    save_file(tensors, file)
    whole = file.read_bytes()
    for broken in (whole[:-10], whole[: len(whole) // 2], b"\xff" * 100, b""):
        file.write_bytes(broken)
        refused(tmp_path, model, r"model.safetensors cannot be read .*; copy the file again")


def test_either_spelling_of_names_is_read(saved, tmp_path):
    _, source, params, _ = saved
    prefixes = {"model.layers": "model.language_model.layers", "model.norm": "model.language_model.norm", "visual": "model.visual"}
    prefixes |= {"model.embed_tokens": "model.language_model.embed_tokens"}

    def respell(name):
        return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), canonical(name))

    save_file({respell(n): x for n, x in load_file(source / "model.safetensors").items()}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path, *abstract_params(tiny_model(source))))


def test_files_of_limited_size_have_an_index(saved, tmp_path, monkeypatch):
    _, source, params, _ = saved
    config = tiny_model(source).config
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 50_000)
    save_params(tmp_path, params, config)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {file: load_file(tmp_path / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(x.nbytes for tensors in held.values() for x in tensors.values())
    assert all(sum(x.nbytes for x in tensors.values()) <= 50_000 or len(tensors) == 1 for tensors in held.values())
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path, *abstract_params(tiny_model(source))))
    (tmp_path / "another.safetensors").write_bytes((tmp_path / files[0]).read_bytes())  # not in the index: nobody's business
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path, *abstract_params(tiny_model(source))))
    (tmp_path / files[1]).unlink()
    refused(tmp_path, tiny_model(source), f"{files[1]} of model.safetensors.index.json is not here; copy the missing files")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, tiny_model(source), "index.json has no weight_map; copy the file again")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, tiny_model(source), "is in another.safetensors too; leave one checkpoint in the folder")


def test_bfloat16_survives_loading_and_saving(saved, tmp_path):
    """bf16 files -> float32 or bf16 parameters -> bf16 files: every bit is kept."""
    _, source, params, _ = saved
    model = tiny_model(source)
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir(), again.mkdir()
    save_params(first, params, model.config, ml_dtypes.bfloat16)
    abstract, shardings = abstract_params(model, make_mesh(MeshConfig(2, 2, 2)))
    for dtype in (np.float32, ml_dtypes.bfloat16):
        typed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract)  # noqa: B023
        loaded = load_params(first, typed, shardings)
        assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(dtype)}
        save_params(again, loaded, model.config, ml_dtypes.bfloat16)
        before, after = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name].view(np.uint16), after[name].view(np.uint16)) for name in before)


def test_loading_says_how_far_it_is(saved):
    _, source, _, _ = saved
    seen, size = [], (source / "model.safetensors").stat().st_size
    load_params(source, *abstract_params(tiny_model(source)), lambda *numbers: seen.append(numbers))
    assert [done for done, _ in seen] == list(range(1, len(load_file(source / "model.safetensors")) + 1))
    assert 0.9 * size < seen[-1][1] < size


def test_each_tensor_is_read_once(saved, monkeypatch):
    """On a mesh of eight devices too: a tensor's parts are cut from one view of the file."""
    _, source, _, _ = saved
    reads = []
    monkeypatch.setattr(checkpoint.Tensor, "read", lambda self, read=checkpoint.Tensor.read: reads.append(self.offset) or read(self))
    load_params(source, *abstract_params(tiny_model(source), make_mesh(MeshConfig(2, 2, 2))))
    assert len(reads) == len(set(reads)) == len(load_file(source / "model.safetensors"))


def test_what_was_read_is_not_copied(saved, monkeypatch):
    """CPU devices take the memory that the files were read into, so that a host holds its share once."""
    made = []
    monkeypatch.setattr(checkpoint, "_aligned", lambda *args, make=checkpoint._aligned: made.append(make(*args)) or made[-1])
    params = load_params(saved[1], *abstract_params(tiny_model(saved[1]), make_mesh(MeshConfig(2, 2, 2))))
    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    assert {shard.unsafe_buffer_pointer() for shard in shards} == {part.ctypes.data for part in made}
