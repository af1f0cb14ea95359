"""The device mesh and the two tables that place logical axes on it (DESIGN section 4).

`data` may span slices, `fsdp` shards parameters and batch rows, `tensor` splits heads, MLP and vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgjax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Training shards weights over fsdp and tensor; the rollout gathers them over fsdp
# once per step, so that its decode loop moves activations only.
TRAINING: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "patch": None,
}
ROLLOUT = TRAINING | {"embed": None}


def between_cpu_processes() -> bool:
    """Whether programs talk through gloo, which tells messages apart by their order alone. XLA starts a collective beside a running loop
    that it does not depend on (jax 0.10.2), and if the loop has collectives too, their messages are mixed up. So these processes have
    programs without such a pair: what is outside of the layers' loops is not sharded, and nothing is over tensor."""
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh of all devices (or of those given) with axes (data, fsdp, tensor). One size may be -1 and takes what is left. Of several TPU
    slices, which a slower network joins, only `data` spans them."""
    devices, sizes = devices or jax.devices(), [config.data, config.fsdp, config.tensor]
    count, free = len(devices), sizes.count(-1)
    known = int(np.prod([s for s in sizes if s != -1]))
    if free > 1 or min(s for s in (*sizes, 1) if s != -1) < 1 or count % known or (not free and known != count):
        raise ValueError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit {count} devices: "
            f"the product must be {count}, and at most one axis may be -1"
        )
    shape = tuple(count // known if s == -1 else s for s in sizes)
    if shape[2] > 1 and between_cpu_processes():
        raise ValueError(f"mesh tensor={shape[2]} does not work between CPU processes, whose messages gloo would mix up: it must be 1")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise ValueError(f"mesh data={shape[0]} must be a multiple of the {slices} slices: no other axis spans them")
    if slices > 1:
        inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    mesh = jax.sharding.Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shares = set(shares_of(mesh).values())
    if sum(len(share.own) for share in shares) > shape[0] * shape[1] or len({len(share.own) for share in shares}) > 1:
        raise ValueError(
            f"mesh data={shape[0]} fsdp={shape[1]} tensor={shape[2]} parts the batch so that processes have some of each other's rows; "
            "give tensor a number that is a multiple or a divisor of a process's devices"
        )
    return mesh


class Share(NamedTuple):
    """The shards of a batch's rows that a process has devices of, in order, and how many there are. Processes that only `tensor` parts
    have the same ones: each of them reads these rows, and computes on the host what belongs to them."""

    own: tuple[int, ...] = (0,)
    shards: int = 1

    def of(self, x: np.ndarray) -> np.ndarray:
        """Its rows of a batch [P, ...]. ValueError where shards are uneven."""
        if len(self.own) == self.shards:
            return x
        if len(x) % self.shards:
            raise ValueError(f"{len(x)} rows do not divide over the {self.shards} shards of the batch, which lie on several processes")
        return x.reshape(self.shards, -1, *x.shape[1:])[list(self.own)].reshape(-1, *x.shape[1:])


WHOLE = Share()


def shares_of(mesh) -> dict[int, Share]:
    """Of every process of a mesh, by its number."""
    process_WT = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(-1, mesh.shape["tensor"])
    own = lambda process: tuple(np.flatnonzero((process_WT == process).any(axis=1)).tolist())  # noqa: E731
    return {process: Share(own(process), len(process_WT)) for process in np.unique(process_WT).tolist()}


def share_of(mesh) -> Share:
    """This process's."""
    return shares_of(mesh)[jax.process_index()]


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], rules: dict, mesh) -> PartitionSpec:
    """PartitionSpec of an array with the given logical axes. An axis whose mesh axes do not divide it is replicated
    (2 key-value heads on 4 tensor devices); a name that the table lacks is an error, never a silent default."""
    placed: list = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise KeyError(f"no rule for logical axis {name!r}; known axes: {', '.join(sorted(rules))}")
        axes = rules[name] if name is not None else None
        ways = int(np.prod([mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())]))
        placed.append(axes if size % ways == 0 else None)
    return PartitionSpec(*placed)


def batch_shards(rows: int) -> int:
    """Shards that `rows` rows lie on under the mesh in force; 1 where they do not divide (they are replicated then)."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return ways if rows % ways == 0 else 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation to its logical axes on the mesh in force; without a mesh, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(names, x.shape, TRAINING, mesh))


def param_shardings(boxed, rules: dict, mesh):
    """Shardings of a parameter tree from the logical axes that its (abstract, boxed) leaves declare."""
    outside = rules | {"embed": None} if between_cpu_processes() else rules

    def place(leaf):
        return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, rules if "layers" in leaf.names else outside, mesh))

    return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def rows(mesh) -> NamedSharding:
    """Leading axis over the batch axes, the rest replicated: how every [P, ...] array of a step lies."""
    return NamedSharding(mesh, PartitionSpec(TRAINING["batch"]))


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_everywhere(tree, mesh):
    """Arrays that all processes have alike, on every device of a mesh; of devices that are only described (plan/), here."""
    if not set(mesh.devices.flat) <= set(jax.devices()):
        return jax.device_put(tree)
    place = lambda x: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x))  # noqa: E731
    return jax.tree.map(place, tree)


def take_rows(x: jax.Array, index_N: jax.Array, shards: int, axis: int = 0) -> jax.Array:
    """Entries of an array along its batch axis, as numbered in each shard of it (past the end: the last), so that nothing moves between
    devices. `index_N` lies by shards as well."""
    cut = lambda x, axis: x.reshape(*x.shape[:axis], shards, -1, *x.shape[axis + 1 :])  # noqa: E731
    take = jax.vmap(lambda x, index: jnp.take(x, index, axis=axis, mode="clip"), in_axes=(axis, 0), out_axes=axis)
    found = take(cut(x, axis), cut(index_N, 0))
    return found.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def place_rows(tree, mesh):
    """This process's rows of a batch (numpy, leading axis), as `Share.of` gives them -> global arrays sharded by rows. Rows of one process
    alone that the batch axes do not divide are replicated (a single request on many devices). ValueError where there are several."""
    share = share_of(mesh)

    def place(x):
        x = np.asarray(x)
        size, rest = divmod(len(x), len(share.own))
        if rest and len(share.own) == share.shards:
            return jax.device_put(x, replicated(mesh))
        if rest:
            raise ValueError(f"{len(x)} rows do not divide over the {len(share.own)} shards that this process has of the batch")
        at = {w * size: x[n * size : (n + 1) * size] for n, w in enumerate(share.own)}
        whole = (size * share.shards, *x.shape[1:])
        return jax.make_array_from_callback(whole, rows(mesh), lambda index: at[index[0].start or 0])

    return jax.tree.map(place, tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that lies by rows, in order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def gather_rows(tree, mesh):
    """All rows of host arrays of which each process has its share, process after process; what several have comes once."""
    shares = shares_of(mesh)
    first = {share: process for process, share in reversed(shares.items())}
    counts = np.isin(list(shares), list(first.values()))
    once = lambda x: x.reshape(len(shares), -1, *x.shape[1:])[counts].reshape(-1, *x.shape[1:])  # noqa: E731
    return jax.tree.map(once, process_allgather(tree, tiled=True))
