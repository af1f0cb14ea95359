"""Hugging Face checkpoints in and out, generic over the parameter tree: its paths are the checkpoint's names.

A leaf's path gives its tensor name (`kernel`, `scale` and `embedding` are called `weight` there; scanned layers insert their
number), its shape gives the layout (a checkpoint's `[out, in]` is transposed and reshaped to the leaf).
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pgjax.config import ModelConfig, TextConfig, VisionConfig
from pgjax.files import read_json

SCANNED = {"layers", "blocks"}


def config_from_hf(path: Path) -> ModelConfig:
    """ModelConfig of a checkpoint directory's config.json (Qwen2.5-VL)."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json here; point to a Hugging Face checkpoint directory")
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"{path / 'config.json'}: model_type {raw.get('model_type')!r} is not supported; it must be qwen2_5_vl")
    t, v = raw.get("text_config", raw), raw["vision_config"]
    rope = t.get("rope_parameters") or t.get("rope_scaling") or {}
    heads = t["num_attention_heads"]
    text = TextConfig(
        vocab=t["vocab_size"],
        width=t["hidden_size"],
        layers=t["num_hidden_layers"],
        heads=heads,
        kv_heads=t["num_key_value_heads"],
        head_dim=t["hidden_size"] // heads,
        mlp=t["intermediate_size"],
        rope_theta=rope.get("rope_theta") or t["rope_theta"],
        mrope_section=tuple(rope["mrope_section"]),
        eps=t["rms_norm_eps"],
        tied=raw.get("tie_word_embeddings", False),
    )
    vision = VisionConfig(
        width=v["hidden_size"],
        depth=v["depth"],
        heads=v["num_heads"],
        mlp=v["intermediate_size"],
        patch=v.get("patch_size", 14),
        temporal=v.get("temporal_patch_size", 2),
        merge=v.get("spatial_merge_size", 2),
        window=v["window_size"],
        full_blocks=tuple(v["fullatt_block_indexes"]),
        channels=v.get("in_channels", v.get("in_chans", 3)),
    )
    return ModelConfig(text=text, vision=vision)


def tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """Checkpoint tensor names of one leaf: one, or one per layer for scanned layers (leading axis)."""
    *parts, leaf = path
    name = "bias" if leaf == "bias" else "weight"
    at = next((i for i, p in enumerate(parts) if p in SCANNED), None)
    if at is None:
        return [".".join([*parts, name])]
    return [".".join([*parts[: at + 1], str(n), *parts[at + 1 :], name]) for n in range(shape[0])]


def _matrix(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of one layer's leaf in the checkpoint, later axes taken as one: a kernel's are `[out, in]`, and
    attention outputs have two input axes, every other kernel one."""
    if path[-1] != "kernel":
        cut = len(shape) if path[-1] == "bias" else 1
        return int(np.prod(shape[:cut])), int(np.prod(shape[cut:]))
    inputs = 2 if path[-2] in ("o_proj", "proj") and len(shape) == 3 else 1
    return int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))


def _to_leaf(tensor: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint tensor in the leaf's layout (for scanned leaves, that of one layer)."""
    if path[-1] == "kernel":
        tensor = tensor.reshape(tensor.shape[0], -1).T
    return tensor.reshape(shape)


def _from_leaf(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """One layer's leaf in checkpoint layout."""
    if path[-1] != "kernel":
        return array.reshape(-1) if path[-1] == "bias" else array
    return np.ascontiguousarray(array.reshape(_matrix(path, array.shape)[::-1]).T)


def _headers(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Tensor name -> file and shape, over model.safetensors or all shards."""
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{path}: no .safetensors file here; point to a Hugging Face checkpoint directory")
    where = {}
    for file in found:
        try:
            with safe_open(file, "np") as f:
                where |= {name: (file, tuple(f.get_slice(name).get_shape())) for name in f.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}); copy the file again") from error
    return where


def _layer_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one layer's part of a leaf: scanned leaves have a leading axis of layers."""
    return shape[1:] if SCANNED & set(path) else shape


def check_params(path: str | Path, abstract) -> dict[str, Path]:
    """Tensor name -> file of a checkpoint directory that fits `abstract` (the unboxed tree of shapes), read from the headers alone.

    ValueError for a directory without weights, a broken file, missing tensors (all at once) and a tensor of another shape.
    """
    path = Path(path)
    where, leaves = _headers(path), traverse_util.flatten_dict(abstract)
    missing = [n for p, leaf in leaves.items() for n in tensor_names(p, leaf.shape) if n not in where]
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")
    for p, leaf in leaves.items():
        wanted = _matrix(p, _layer_shape(p, leaf.shape))
        for name in tensor_names(p, leaf.shape):
            file, shape = where[name]
            if (*shape[:1], int(np.prod(shape[1:]))) != wanted:
                raise ValueError(f"{file}: tensor {name} has shape {shape}; the recipe's model asks for {wanted}")
    return {name: file for name, (file, _) in where.items()}


def load_params(path: str | Path, abstract, shardings):
    """Parameters of a checkpoint directory, float32, straight into sharded arrays: a process reads what its devices need.

    `abstract` is the unboxed tree of shapes, `shardings` its tree of NamedShardings. Errors as in `check_params`.
    """
    where, leaves = check_params(path, abstract), traverse_util.flatten_dict(abstract)

    def load(p, leaf, sharding):
        names, layer_shape = tensor_names(p, leaf.shape), _layer_shape(p, leaf.shape)

        def read(name):
            with safe_open(where[name], "np") as f:
                return _to_leaf(f.get_tensor(name).astype(np.float32), p, layer_shape)

        def shard(index):
            if layer_shape == leaf.shape:
                return read(names[0])[index]
            layers = range(*index[0].indices(leaf.shape[0]))
            return np.stack([read(names[n])[index[1:]] for n in layers])

        return jax.make_array_from_callback(leaf.shape, sharding, shard)

    flat_shardings = traverse_util.flatten_dict(shardings)
    return traverse_util.unflatten_dict({p: load(p, leaf, flat_shardings[p]) for p, leaf in leaves.items()})


def tensors(params) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every checkpoint tensor of a parameter tree."""
    for path, leaf in traverse_util.flatten_dict(params).items():
        names = tensor_names(path, leaf.shape)
        layers = np.asarray(leaf) if SCANNED & set(path) else np.asarray(leaf)[None]
        yield from ((name, _from_leaf(layer, path)) for name, layer in zip(names, layers, strict=True))


def save_params(path: Path, params, vision: VisionConfig) -> None:
    """Write model.safetensors with the checkpoint's own names and shapes."""
    out = dict(tensors(params))
    patch = "visual.patch_embed.proj.weight"
    out[patch] = out[patch].reshape(-1, vision.channels, vision.temporal, vision.patch, vision.patch)
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
