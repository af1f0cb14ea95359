"""From a recipe to what every program needs: mesh, model, shardings, parameters, optimiser state."""

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from pgjax.config import ModelConfig, Recipe
from pgjax.models.checkpoint import load_params, tensor_shapes
from pgjax.models.qwen_vl import QwenVL, init_boxed
from pgjax.parallel import mesh as meshes
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.progress import Progress
from pgjax.train.trainable import base, merge, split
from pgjax.train.update import TrainState, make_optimizer


@dataclass(frozen=True)
class Setup:
    """A model on a mesh. `training` and `rollout` are the two placements of its parameters (DESIGN section 4), adapters included.

    The base model, without adapters, is what is loaded and what the reference holds. With LoRA the reference is in the compute type:
    it is never updated, and a float32 copy would only be rounded at every use.
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
        """Base parameters of a Hugging Face checkpoint directory; says how far and how fast."""
        began, shapes = time.monotonic(), self.abstract_reference()
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

    def state(self, params: dict, optimizer: optax.GradientTransformation, seed: int = 0) -> tuple[TrainState, dict]:
        """A fresh training state around given base parameters, and the frozen reference: a copy of what is trained, and the rest itself.

        With LoRA the state has fresh adapters (from `seed`), and the reference is all of `params`, in the compute type.
        """
        trained, frozen = split(params, self.model.config)
        if self.model.config.lora_rank:  # nothing of a base tree is trained
            trained, frozen = self._fresh(seed, self.trained), jax.jit(self.cast, out_shardings=base(self.training))(frozen)
        start = lambda p: (TrainState(jnp.int32(0), p, optimizer.init(p)), jax.tree.map(jnp.copy, base(p)))  # noqa: E731
        places = self.state_shardings(optimizer), base(self.trained(self.training))
        state, copy = jax.jit(start, out_shardings=places)(trained)
        return state, merge(copy, frozen)

    def abstract_reference(self) -> dict:
        """Shapes with shardings, as a reference is restored."""
        shapes = base(self.abstract)
        shapes = jax.eval_shape(self.cast, shapes) if self.model.config.lora_rank else shapes
        return jax.tree.map(_placed, shapes, base(self.training))

    def abstract_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        shapes = jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), self.trained(self.abstract))
        return jax.tree.map(_placed, shapes, self.state_shardings(optimizer))

    def _fresh(self, seed: int, part) -> dict:
        init = lambda key: part(nn.meta.unbox(init_boxed(self.model, key)))  # noqa: E731
        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=part(self.training))(jax.random.key(seed))


def _placed(x, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def make_setup(config: ModelConfig, mesh: jax.sharding.Mesh) -> Setup:
    model = QwenVL(config)
    boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))
    training, rollout = (meshes.param_shardings(boxed, rules, mesh) for rules in (meshes.TRAINING, meshes.ROLLOUT))
    return Setup(mesh, model, nn.meta.unbox(boxed), training, rollout)


def run_params(run: Path, recipe: Recipe, setup: Setup, best: bool = False) -> dict:
    """The policy of a run folder's newest checkpoint, or of its `best` (grpo.keep_best).

    Checkpoints hold what is trained; the rest is read from the run's reference. Raises ValueError where there is no such checkpoint.
    """
    checkpoints, references = Checkpoints(run / "checkpoints"), Checkpoints(run / "reference")
    if best and checkpoints.best() is None:
        raise ValueError(f"run {run} has no best checkpoint: none was scored (grpo.keep_best); leave out --best")
    updates = recipe.grpo.steps * (recipe.grpo.prompts // recipe.grpo.mini_prompts)
    abstract = setup.abstract_state(make_optimizer(recipe.grpo.optimizer, updates))
    params = checkpoints.restore(abstract, checkpoints.best() if best else None).params
    if split(setup.abstract, recipe.model)[1]:
        params = merge(params, references.restore(setup.abstract_reference()))
    checkpoints.close(), references.close()
    return params
