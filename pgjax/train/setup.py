"""From a recipe to what every program needs: mesh, model, shardings, parameters, optimiser state."""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from pgjax.config import ModelConfig
from pgjax.models.checkpoint import check_params, load_params, tensor_shapes
from pgjax.models.qwen_vl import QwenVL, init_boxed
from pgjax.parallel import mesh as meshes
from pgjax.parallel.program import in_turn
from pgjax.train.progress import Progress
from pgjax.train.trainable import base, split
from pgjax.train.update import TrainState


@dataclass(frozen=True)
class Setup:
    """A model on a mesh. `training` and `rollout` are the two placements of its parameters (DESIGN section 4), adapters included.

    The base model, without adapters, is what is loaded and what the reference holds.
    """

    mesh: jax.sharding.Mesh
    model: QwenVL
    abstract: dict
    training: dict
    rollout: dict

    def init(self, seed: int) -> dict:
        """Fresh float32 parameters of the base model, born sharded."""
        return self._fresh(seed, base)

    def load(self, path: str | Path) -> dict:
        """Base parameters of a Hugging Face checkpoint directory, float32, or where none of them is trained in the compute type; says
        how far it is and how fast."""
        began, shapes = time.monotonic(), self.abstract_reference() if self.model.config.lora_rank else base(self.abstract)
        check_params(path, shapes)  # whose complaint is one line, not one below the progress
        with Progress("load", len(tensor_shapes(shapes)), show=jax.process_index() == 0) as progress:
            rate = lambda size: {"GB": size / 1e9, "GB/s": size / 1e9 / (time.monotonic() - began)}  # noqa: E731
            return load_params(path, shapes, base(self.training), lambda done, size: progress.update(done, **rate(size)))

    def cast(self, params: dict) -> dict:
        """Parameters in the compute type: with the rollout's shardings, its copy of the weights, gathered once per step."""
        return jax.tree.map(lambda x: x.astype(jnp.dtype(self.model.config.compute_dtype)), params)

    def trained(self, params: dict) -> dict:
        """The trained part of a tree of parameters, shapes or shardings."""
        return split(params, self.model.config)[0]

    def state_shardings(self, optimizer: optax.GradientTransformation) -> TrainState:
        """Optimiser moments lie as their parameters do; scalars are replicated."""
        everywhere, training = meshes.replicated(self.mesh), self.trained(self.training)
        shapes = jax.eval_shape(optimizer.init, self.trained(self.abstract))
        opt = optax.tree_utils.tree_map_params(
            optimizer, lambda _, sharding: sharding, shapes, training, transform_non_params=lambda _: everywhere
        )
        return TrainState(everywhere, training, opt)

    def state(self, params: dict, optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
        """A fresh training state around given base parameters, which it takes over; with LoRA, around fresh adapters (from `seed`)."""
        trained = self._fresh(seed, self.trained) if self.model.config.lora_rank else self.trained(params)
        start = lambda p: TrainState(jnp.int32(0), p, optimizer.init(p))  # noqa: E731
        return in_turn(jax.jit(start, out_shardings=self.state_shardings(optimizer))(trained))

    def reference(self, params: dict) -> dict:
        """A copy of base parameters as the frozen reference. In the compute type: it is never updated, and rounded at every use anyhow."""
        copied = lambda params: jax.tree.map(jnp.copy, self.cast(params))  # noqa: E731
        return in_turn(jax.jit(copied, out_shardings=base(self.training))(params))

    def abstract_reference(self) -> dict:
        """Shapes with shardings, as a reference is restored."""
        return jax.tree.map(_placed, jax.eval_shape(self.cast, base(self.abstract)), base(self.training))

    def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        shapes = jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), self.trained(self.abstract))
        return jax.tree.map(_placed, shapes, self.state_shardings(optimizer))

    def _fresh(self, seed: int, part) -> dict:
        init = lambda key: part(nn.meta.unbox(init_boxed(self.model, key)))  # noqa: E731
        with jax.set_mesh(self.mesh):
            return in_turn(jax.jit(init, out_shardings=part(self.training))(jax.random.key(seed)))


def _placed(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def make_setup(config: ModelConfig, mesh: jax.sharding.Mesh) -> Setup:
    model = QwenVL(config)
    boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))
    training, rollout = (meshes.param_shardings(boxed, rules, mesh) for rules in (meshes.TRAINING, meshes.ROLLOUT))
    return Setup(mesh, model, nn.meta.unbox(boxed), training, rollout)
