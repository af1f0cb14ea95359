"""Checkpoints in and out: names and shapes of transformers, bits unchanged, errors that say what to do."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_qwen import abstract_params, build, golden, tiny_model

from pgjax.models.checkpoint import config_from_hf, load_params, save_params


@pytest.fixture(scope="module", params=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A golden case: its arrays, the directory that it was read from, its parameters, and where they were saved again."""
    arrays, source, target = golden(request.param), tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    model, params = build(arrays, source)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_params(target, params, model.config.vision)
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
    refused(tmp_path, model, "no .safetensors file here; point to a Hugging Face checkpoint directory")

    name = "model.layers.1.self_attn.k_proj.bias"
    save_file({n: x for n, x in tensors.items() if n != name}, tmp_path / "model.safetensors")
    refused(tmp_path, model, f"1 tensors are missing: {name}$")

    save_file({n: x for n, x in tensors.items() if "visual" not in n}, tmp_path / "model.safetensors")
    refused(tmp_path, model, r"\d+ tensors are missing: visual.* \.\.\.$")

    for misshapen in (tensors[name][:-1], np.stack([tensors[name]] * 2)):
        save_file(tensors | {name: misshapen}, tmp_path / "model.safetensors")
        refused(tmp_path, model, f"tensor {name} has shape")

    name = "model.layers.0.mlp.down_proj.weight"  # as many numbers, but turned
    save_file(tensors | {name: np.ascontiguousarray(tensors[name].T)}, tmp_path / "model.safetensors")
    refused(tmp_path, model, f"tensor {name} has shape")


def test_other_models_are_refused(saved, tmp_path):
    raw = json.loads((saved[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama' is not supported; it must be qwen2_5_vl"):
        config_from_hf(tmp_path)
    with pytest.raises(ValueError, match="no config.json here; point to a Hugging Face checkpoint directory"):
        config_from_hf(tmp_path / "nowhere")
