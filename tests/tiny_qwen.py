"""Tiny models of the golden files, for the tests that need a whole model."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from golden.make_qwen import GOLDEN, write_checkpoint

from pgjax.config import MeshConfig
from pgjax.models.checkpoint import load_params
from pgjax.models.hf_config import config_from_hf
from pgjax.models.qwen_vl import QwenVL, init_boxed
from pgjax.parallel.mesh import TRAINING, make_mesh, param_shardings

INPUTS = ("patches_PIB", "yx_PI2", "grid_PI2", "image_PI", "tokens_PT", "visual_PT", "position_PTX", "length_P")
QUICK = {"xla_backend_optimization_level": "0"}  # compiling takes most of these tests' time; this takes two thirds of it away


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}


def inputs(arrays) -> list[np.ndarray]:
    """Arguments of QwenVL.__call__; patches are stored as integers of 1/64."""
    return [arrays[k] / np.float32(64) if k == "patches_PIB" else arrays[k] for k in INPUTS]


def tiny_model(path: Path, remat: str = "none") -> QwenVL:
    return QwenVL(dataclasses.replace(config_from_hf(path), compute_dtype="float32", remat=remat))


def abstract_params(model: QwenVL, mesh=None):
    """Shapes and shardings of the parameters."""
    boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))
    return nn.meta.unbox(boxed), param_shardings(boxed, TRAINING, mesh or make_mesh(MeshConfig(), jax.devices()[:1]))


def build(arrays, path: Path):
    """The model of a golden case and its parameters, through a checkpoint written to `path`."""
    write_checkpoint(path, json.loads(str(arrays["config"])), json.loads(str(arrays["shapes"])))
    model = tiny_model(path)
    return model, load_params(path, *abstract_params(model))
