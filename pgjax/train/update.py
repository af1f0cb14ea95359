"""The update that GRPO and SFT share: gradients of a sum of losses over micro-batches, divided once, then one optimiser step.

Losses come as (sum, count), so that micro-batches, mini-batches and devices add up to the exact mean. Splits take every n-th row:
each device then works on rows that it already holds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from pgjax.config import OptimizerConfig

Pairs = dict[str, tuple[jax.Array, jax.Array]]


@struct.dataclass
class TrainState:
    """Everything that an update changes. `updates` counts optimiser steps; `params` are the trained ones alone (train/trainable.py)."""

    updates: jax.Array
    params: dict
    opt_state: optax.OptState


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """AdamW behind a global-norm clip (0: none); the schedule falls over `updates` optimiser steps unless the config says how many."""
    rate, warm = config.learning_rate, config.warmup_steps
    falling = max((config.decay_updates or updates) - warm, 1)
    after = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, 0.0, falling),
        "cosine": lambda: optax.cosine_decay_schedule(rate, falling),
    }[config.schedule]()
    schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warm), after], [warm]) if warm else after
    adam = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(), adam)


def split_rows(tree, parts: int, index):
    """Rows index, index + parts, ... of every leaf: a mini-batch of whole groups, without moving rows between devices."""
    take = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, parts, *x.shape[1:]), index, axis=1, keepdims=False)  # noqa: E731
    return tree if parts == 1 else jax.tree.map(take, tree)


def mean(total, number: jax.Array):
    """total / number for a sum or a tree of sums; 0 where nothing counted."""
    return jax.tree.map(lambda x: x / jnp.maximum(number, 1e-30), total)


def update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    loss_sum: Callable[[dict, object], tuple[jax.Array, Pairs]],
    batch,
    number: jax.Array,
    micro_batches: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step on `batch`. `loss_sum(params, micro) -> (sum of losses, metric pairs)`; `number` divides the sum
    (known beforehand from the masks). Metrics are means; `actor/grad_norm` is that of the whole gradient, before clipping. Where that is no
    number the state stays as it is, and `actor/skipped` is 1."""

    def micro(index):
        grad = jax.grad(loss_sum, has_aux=True)
        return grad(state.params, split_rows(batch, micro_batches, index))

    if micro_batches == 1:
        gradient, pairs = micro(0)
    else:
        shapes = jax.eval_shape(micro, jnp.int32(0))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, index: (jax.tree.map(jnp.add, total, micro(index)), None)  # noqa: E731
        (gradient, pairs), _ = jax.lax.scan(add, zero, jnp.arange(micro_batches))
    gradient = mean(gradient, number)
    step, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    metrics = {name: mean(*pair) for name, pair in pairs.items()}
    norm = metrics["actor/grad_norm"] = optax.tree.norm(gradient)
    metrics["actor/skipped"] = 1 - jnp.isfinite(norm).astype(jnp.float32)
    after = TrainState(state.updates + 1, optax.apply_updates(state.params, step), opt_state)
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(norm), new, old), after, state), metrics


class Skips:
    """Counts steps in a row whose every update was skipped."""

    def __init__(self, config: OptimizerConfig):
        self.most, self.now = config.max_skipped, 0

    def see(self, step: int, skipped: float) -> None:
        """`skipped` is the share of the step's updates. ValueError when too many steps in a row changed nothing."""
        self.now = self.now + 1 if skipped == 1 else 0
        if self.now > self.most:
            raise ValueError(
                f"the gradient of step {step} is no number, as those of the {self.most} steps before it; "
                "lower optimizer.learning_rate or set optimizer.grad_clip, and start over with --fresh"
            )
