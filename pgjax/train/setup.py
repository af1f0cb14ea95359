"""From a recipe to what every program needs: mesh, model, shardings, parameters, optimiser state."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from pgjax.config import ModelConfig
from pgjax.models.checkpoint import load_params
from pgjax.models.qwen2_5_vl import Qwen25VL, init_boxed
from pgjax.parallel import mesh as meshes
from pgjax.train.update import TrainState


@dataclass(frozen=True)
class Setup:
    """A model on a mesh. `training` and `rollout` are the two placements of its parameters (DESIGN section 4)."""

    mesh: jax.sharding.Mesh
    model: Qwen25VL
    abstract: dict
    training: dict
    rollout: dict

    def init(self, seed: int) -> dict:
        """Fresh float32 parameters, born sharded."""
        init = lambda key: nn.meta.unbox(init_boxed(self.model, key))  # noqa: E731
        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=self.training)(jax.random.key(seed))

    def load(self, path: str | Path) -> dict:
        """Parameters of a Hugging Face checkpoint directory."""
        return load_params(path, self.abstract, self.training)

    def cast(self, params: dict) -> dict:
        """Parameters in the compute type: with the rollout's shardings, its copy of the weights, gathered once per step."""
        return jax.tree.map(lambda x: x.astype(jnp.dtype(self.model.config.compute_dtype)), params)

    def state_shardings(self, optimizer: optax.GradientTransformation) -> TrainState:
        """Optimiser moments lie as their parameters do; scalars are replicated."""
        everywhere = meshes.replicated(self.mesh)
        shapes = jax.eval_shape(optimizer.init, self.abstract)
        opt = optax.tree_utils.tree_map_params(
            optimizer, lambda _, sharding: sharding, shapes, self.training, transform_non_params=lambda _: everywhere
        )
        return TrainState(everywhere, self.training, opt)

    def state(self, params: dict, optimizer: optax.GradientTransformation) -> tuple[TrainState, dict]:
        """A fresh training state around given parameters, and a copy of them as the frozen reference."""
        start = lambda p: (TrainState(jnp.int32(0), p, optimizer.init(p)), jax.tree.map(jnp.copy, p))  # noqa: E731
        return jax.jit(start, out_shardings=(self.state_shardings(optimizer), self.training))(params)

    def abstract_params(self) -> dict:
        """Shapes with shardings, as a checkpoint is restored."""
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.training)

    def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        shapes = jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), self.abstract)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.state_shardings(optimizer))


def make_setup(config: ModelConfig, mesh: jax.sharding.Mesh) -> Setup:
    model = Qwen25VL(config)
    boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))
    training, rollout = (meshes.param_shardings(boxed, rules, mesh) for rules in (meshes.TRAINING, meshes.ROLLOUT))
    return Setup(mesh, model, nn.meta.unbox(boxed), training, rollout)
