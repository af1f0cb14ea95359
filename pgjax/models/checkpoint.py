"""Hugging Face checkpoints in and out, generic over the parameter tree: its paths are the checkpoint's names.

A leaf's path gives its tensor name (`kernel`, `scale` and `embedding` are called `weight` there; scanned layers insert their
number), its shape gives the layout (a checkpoint's `[out, in]` is transposed and reshaped to the leaf).
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pgjax.config import ModelConfig
from pgjax.files import read_json

SCANNED = {"layers", "blocks", "deepstack_merger_list"}
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
# What the two halves of our tree are called in files. Either spelling is read, the family's own is written.
PREFIXES = {
    "qwen2_5_vl": {"model": "model", "visual": "visual"},
    "qwen3_vl": {"model": "model.language_model", "visual": "model.visual"},
}
FILE_BYTES = 4 * 2**30  # of one file of an exported checkpoint

Seen = Callable[[int, int], None]  # tensors and bytes read so far


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Memory-mapped: what is not looked at is not read."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def tensor_names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """Checkpoint tensor names of one leaf: one, or one per layer for scanned layers (leading axis)."""
    *parts, leaf = path
    name = "bias" if leaf == "bias" else "weight"
    at = next((i for i, p in enumerate(parts) if p in SCANNED), None)
    if at is None:
        return [".".join([*parts, name])]
    return [".".join([*parts[: at + 1], str(n), *parts[at + 1 :], name]) for n in range(shape[0])]


def _layer_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one layer's part of a leaf: scanned leaves have a leading axis of layers."""
    return shape[1:] if SCANNED & set(path) else shape


def _inputs(path: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Input axes of one layer's kernel: attention outputs have two, every other kernel one."""
    return 2 if path[-2] in ("o_proj", "proj") and len(shape) == 3 else 1


def _matrix(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one layer's leaf in the checkpoint, with a convolution's window as one axis: `[out, in]` for a kernel, whose heads
    are joined; others as they are, biases flat."""
    if path[-1] == "bias":
        return (math.prod(shape),)
    if path[-1] != "kernel":
        return shape
    inputs = _inputs(path, shape)
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def _to_leaf(tensor: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A checkpoint tensor as a view in the leaf's layout (for scanned leaves, that of one layer)."""
    if path[-1] != "kernel":
        return tensor.reshape(shape)
    inputs = _inputs(path, shape)
    split = tensor.reshape(*shape[inputs:], *shape[:inputs])
    return np.moveaxis(split, range(-inputs, 0), range(inputs))


def _copy(part: np.ndarray, view: np.ndarray, path: tuple[str, ...]) -> None:
    """Fill `part` from a view in its layout, a few rows of the file at a time: turned as a whole, a matrix misses the cache everywhere."""
    at = _inputs(path, part.shape) if path[-1] == "kernel" else 0  # the file's slowest axis
    step = max(1, 2**18 * view.shape[at] // view.size)
    for start in range(0, view.shape[at], step):
        rows = (slice(None),) * at + (slice(start, start + step),)
        part[rows] = view[rows].astype(part.dtype, order="K")


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array whose memory a CPU device takes as it is; from any other address it would make a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _from_leaf(array: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    """One layer's leaf in checkpoint layout."""
    matrix = _matrix(path, array.shape)
    return np.ascontiguousarray(array.reshape(matrix[::-1]).T) if path[-1] == "kernel" else array.reshape(matrix)


def canonical(name: str) -> str:
    """A tensor's name as our tree has it, whichever of the PREFIXES the file uses."""
    for prefix, ours in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def _files_of(path: Path) -> list[Path]:
    """The checkpoint's files: those of its index, else every .safetensors file that lies there."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise ValueError(f"{path}: no .safetensors file here; point to a Hugging Face checkpoint directory")
        return found
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map; copy the file again")
    files = [path / name for name in sorted({*weight_map.values()})]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{path}: {', '.join(absent)} of {index.name} is not here; copy the missing files")
    return files


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """Canonical name -> place. Headers alone are read."""
    where: dict[str, Tensor] = {}
    for file in _files_of(path):
        try:
            with safe_open(file, "np"):  # checks header and length
                pass
            with file.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}); copy the file again") from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{file}: tensor {name} has type {entry['dtype']}; {', '.join(DTYPES)} are read")
            if canonical(name) in where:
                raise ValueError(f"{file}: tensor {name} is in {where[canonical(name)].file.name} too; leave one checkpoint in the folder")
            offset = 8 + size + entry["data_offsets"][0]
            where[canonical(name)] = Tensor(file, offset, np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]))
    return where


def tensor_shapes(abstract) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes (a convolution's window as one axis) of the tensors of a parameter tree."""
    leaves = traverse_util.flatten_dict(abstract).items()
    return {name: _matrix(p, _layer_shape(p, leaf.shape)) for p, leaf in leaves for name in tensor_names(p, leaf.shape)}


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"


def check_params(path: str | Path, abstract) -> dict[str, Tensor]:
    """The tensors of a checkpoint directory that fits `abstract` (the unboxed tree of shapes), read from the headers alone.

    ValueError for a directory without weights, a broken or absent file, and for missing, surplus and misshapen tensors, all at once.
    A head's own copy beside a tied embedding is no surplus.
    """
    path, wanted = Path(path), tensor_shapes(abstract)
    where = _tensors_of(path)
    missing = [name for name in wanted if name not in where]
    surplus = [name for name in where if name not in wanted and name != "lm_head.weight" and not name.endswith("inv_freq")]

    def joined(shape):
        return (*shape[:1], math.prod(shape[1:])) if len(shape) > 1 else shape  # a convolution's window is one axis

    bad = [f"{n} {where[n].shape} instead of {shape}" for n, shape in wanted.items() if n in where and joined(where[n].shape) != shape]
    kinds = (("missing", missing), ("surplus", surplus), ("misshapen", bad))
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in kinds if names]
    if problems:
        raise ValueError(f"{path}: tensors do not fit the recipe's model: {'; '.join(problems)}")
    return where


def load_params(path: str | Path, abstract, shardings, seen: Seen = lambda done, size: None):
    """Parameters of a checkpoint directory in `abstract`'s types, straight into sharded arrays.

    A process reads what its devices need, tensor by tensor, and holds no more than their share of the parameters and one tensor.
    `shardings` is the tree of NamedShardings. Errors as in `check_params`.
    """
    where, leaves = check_params(path, abstract), traverse_util.flatten_dict(abstract)
    done = read = 0

    def load(p, leaf, sharding):
        nonlocal done, read
        names, layer_shape = tensor_names(p, leaf.shape), _layer_shape(p, leaf.shape)
        index_of = sharding.addressable_devices_indices_map(leaf.shape)
        indices = {str(index): index for index in index_of.values()}  # devices that replicate a part share it
        shape_of = lambda index: [len(range(*at.indices(size))) for at, size in zip(index, leaf.shape, strict=True)]  # noqa: E731
        part_of = {key: _aligned(shape_of(index), leaf.dtype) for key, index in indices.items()}
        for n, name in enumerate(names):
            tensor = _to_leaf(where[name].read(), p, layer_shape)
            for index in indices.values():
                part, scanned = part_of[str(index)], layer_shape != leaf.shape  # the axis of layers is never sharded
                view = tensor[index[1:] if scanned else index]
                _copy(part[n] if scanned else part, view, p)
                read += view.nbytes
            done += 1
            seen(done, read)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: part_of[str(index)])

    flat_shardings = traverse_util.flatten_dict(shardings)
    return traverse_util.unflatten_dict({p: load(p, leaf, flat_shardings[p]) for p, leaf in leaves.items()})


def tensors(params, config: ModelConfig, dtype) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every checkpoint tensor of a parameter tree, named as the family's files name them."""
    v = config.vision
    for path, leaf in traverse_util.flatten_dict(params).items():
        names = tensor_names((PREFIXES[config.family].get(path[0], path[0]), *path[1:]), leaf.shape)
        layers = leaf if SCANNED & set(path) else [leaf]
        for n, name in enumerate(names):
            tensor = _from_leaf(np.asarray(layers[n]).astype(dtype), path)
            window = path[1:] == ("patch_embed", "proj", "kernel")
            yield name, tensor.reshape(-1, v.channels, v.temporal, v.patch, v.patch) if window else tensor


def save_params(path: Path, params, config: ModelConfig, dtype=np.float32) -> None:
    """Write the parameters with the checkpoint's own names and shapes: model.safetensors, or files of at most FILE_BYTES (a larger
    tensor is a file of its own) with their index. The host holds one file's tensors at a time. One process alone can write."""
    files: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}

    def flush():
        save_file(held, path / f"part-{len(files)}", metadata={"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors(params, config, dtype):
        if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        held[name] = tensor
    flush()
    if len(files) == 1:
        (path / "part-0").rename(path / "model.safetensors")
        return
    weight_map = {}
    for n, sizes in enumerate(files):
        file = f"model-{n + 1:05}-of-{len(files):05}.safetensors"
        (path / f"part-{n}").rename(path / file)
        weight_map |= dict.fromkeys(sizes, file)
    total = sum(size for sizes in files for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
