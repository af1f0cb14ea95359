"""Hardware that is not here: what its makers say of a chip, and meshes of TPUs that libtpu describes, or of as many CPU devices.

Sources: docs.cloud.google.com/tpu (v5e, v5p, v6e; links are counted one way) and NVIDIA's data sheets (A100, H100, H200, NVLink one
way). A TPU's memory is what libtpu lets a program have of it.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import jax
import numpy as np

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    kind: str  # as jax names it
    memory: float  # bytes
    flops: float  # FLOP/s, dense bfloat16
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to other chips, one way


CHIPS = {
    "v5e": Chip("TPU v5 lite", 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5", 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 31.25 * GIB, 918e12, 1638e9, 400e9),
    "a100": Chip("NVIDIA A100", 80e9, 312e12, 2039e9, 300e9),
    "h100": Chip("NVIDIA H100", 80e9, 989e12, 3350e9, 450e9),
    "h200": Chip("NVIDIA H200", 141e9, 989e12, 4800e9, 450e9),
}
_TOPOLOGY = re.compile(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)")
# libtpu looks for a machine's TPUs and logs that there are none, unless it is told where it is. Read when it is loaded.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Topology:
    """`slices` times a slice (nodes, of GPUs) of `shape` chips."""

    name: str
    slices: int
    shape: tuple[int, ...]
    chip: Chip

    @property
    def count(self) -> int:
        return self.slices * int(np.prod(self.shape))

    @property
    def is_tpu(self) -> bool:
        return self.chip.kind.startswith("TPU")


def parse_topology(name: str) -> Topology:
    """ "v5e:8x8", "2*v5p:4x4x4" for two slices, "h100:8x8" for 8 nodes of 8. ValueError for what is none."""
    found = _TOPOLOGY.fullmatch(name)
    if not found or found[2] not in CHIPS or "0" in (sizes := (found[1] or "1", *found[3].split("x"))):
        raise ValueError(f"topology {name!r} must be like v5e:8x8, 2*v5p:4x4x4 or h100:8x8; chips: {', '.join(CHIPS)}")
    slices, *shape = map(int, sizes)
    return Topology(name, slices, tuple(shape), CHIPS[found[2]])


def prepare(topology: Topology) -> int:
    """Before jax starts: for TPUs, that none is looked for. The number of CPU devices to simulate, which stand in for GPUs; 0 where those
    GPUs are here."""
    if topology.is_tpu:
        for name, value in _NO_TPU.items():
            os.environ.setdefault(name, value)
        return 1
    return 0 if _gpus() == [topology.chip.kind] * topology.count else topology.count


def _gpus() -> list[str]:
    """The GPUs of this machine, as kinds of `CHIPS` or by their own names."""
    if not shutil.which("nvidia-smi"):
        return []
    names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True).stdout.split("\n")
    kinds = [chip.kind for chip in CHIPS.values()]
    return [next((kind for kind in kinds if name.startswith(kind)), name) for name in names if name]


def describe(topology: Topology) -> list[jax.Device]:
    """Its devices, for `make_mesh`: programs can be compiled for them, not run (TPU), or for CPU devices in their place (GPU)."""
    if not topology.is_tpu:
        return jax.devices()
    from jax.experimental import topologies

    name, shape = topology.name.rpartition("*")[2], topology.shape
    options: dict = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if np.prod(shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # whatever libtpu says of it, or that there is no libtpu
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"topology {topology.name}: libtpu (pip install 'pgjax[tpu]') does not describe it: {reason}") from error
