"""Which parameters are trained: all of them, all but the vision tower (`model.freeze_vision`), or adapters alone (`model.lora_rank`).

Trees are parted by path and laid together again; no array is copied. What is not trained is the same in policy and reference, so the
reference holds it for both: the policy is the reference with the trained part laid over it.
"""

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from pgjax.config import ModelConfig

ADAPTER = ("lora_a", "lora_b")


def frozen_tower(config: ModelConfig) -> bool:
    """Whether visual tokens are the same all through a step, in policy and reference."""
    return config.freeze_vision or config.lora_rank > 0


def split(params: dict, config: ModelConfig) -> tuple[dict, dict]:
    """(trained, frozen) parts of a tree of parameters, shapes or shardings."""

    def trained(path: tuple[str, ...]) -> bool:
        return path[-1] in ADAPTER if config.lora_rank else not (config.freeze_vision and path[0] == "visual")

    flat = flatten_dict(params)
    part = lambda wanted: unflatten_dict({path: leaf for path, leaf in flat.items() if trained(path) == wanted})  # noqa: E731
    return part(True), part(False)


def merge(trained: dict, rest: dict) -> dict:
    """One tree of both; where both have a leaf (a whole reference as `rest`) the trained one stands."""
    return unflatten_dict(flatten_dict(rest) | flatten_dict(trained))


def base(params: dict) -> dict:
    """The tree without adapters: what a checkpoint directory and the reference hold. The model takes it as it takes the whole one."""
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if path[-1] not in ADAPTER})


def merge_adapters(params: dict, config: ModelConfig) -> dict:
    """A base tree that computes what `params` with their adapters do, for export: kernel + alpha / rank * lora_a . lora_b, float32."""
    flat = flatten_dict(params)

    def kernel(path: tuple[str, ...], leaf):
        lora_a, lora_b = (flat.get((*path[:-1], name)) for name in ADAPTER)
        if path[-1] != "kernel" or lora_a is None:
            return leaf
        layers, rank = lora_a.shape[0], config.lora_rank
        product = jnp.einsum("lir,lro->lio", lora_a.reshape(layers, -1, rank), lora_b.reshape(layers, rank, -1))
        return leaf.astype(jnp.float32) + config.lora_alpha / rank * product.reshape(leaf.shape)

    return unflatten_dict({path: kernel(path, leaf) for path, leaf in flat.items() if path[-1] not in ADAPTER})
