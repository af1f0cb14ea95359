"""A run folder as training leaves it, around random weights, and a guard of it on one device."""

import dataclasses
import functools
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from tiny_qwen import QUICK
from tiny_recipe import host_params, materials, tiny_recipe

from pgjax.config import MeshConfig
from pgjax.parallel.mesh import make_mesh
from pgjax.rewriter.rewriter import Rewriter
from pgjax.serving.guard import Guard
from pgjax.serving.model import Model
from pgjax.tokenizer import token_bytes
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.run_folder import RunFolder
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer


def ascii_params() -> dict:
    """Random weights that write ASCII: text that is no UTF-8 does not come back as the same tokens, and has no scores."""
    plain = np.zeros((tiny_recipe().model.text.vocab, 1), bool)
    for k, data in enumerate(token_bytes(materials().tokenizer)):
        plain[k] = data is not None and data.isascii()
    return jax.tree_util.tree_map_with_path(lambda path, x: x * plain if "embed_tokens" in jax.tree_util.keystr(path) else x, host_params())


def make_run(path: Path) -> Path:
    recipe = dataclasses.replace(tiny_recipe(), devices=0)  # the process has its devices already
    RunFolder(path, recipe).close()
    materials().tokenizer.save_pretrained(path / "tokenizer")
    setup, config = make_setup(recipe.model, one_device()), recipe.grpo
    optimizer = make_optimizer(config.optimizer, config.steps * (config.prompts // config.mini_prompts))
    state = setup.state(jax.device_put(ascii_params(), setup.training), optimizer)
    checkpoints = Checkpoints(path / "checkpoints", 1)
    checkpoints.save(0, state)
    checkpoints.close()
    return path


def one_device(*_) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def load_guard(path: Path, **how) -> Guard:
    with (
        mock.patch("pgjax.train.saved.make_mesh", one_device),
        mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)),
    ):
        return Guard.load(path, **how)


def rewriter_of(model: Model, kind: type[Rewriter] = Rewriter) -> Rewriter:
    """A rewriter on the engine of another model, which stays the owner's to close."""
    return kind(model.recipe, model.tokenizer, model.automaton, model.engine)
