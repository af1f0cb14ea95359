"""How fast a checkpoint is loaded and what it takes of host memory: a random one of about a billion parameters, in several files.

    python benchmarks/load.py [--dtype float32|bfloat16] [--devices 8] [--json]

Loads in a process of its own, with the file cache warm. On simulated CPU devices the parameters themselves are host memory, so the
peak is to be compared with the share, which there is everything: what is above it is what loading takes beside.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def model():
    from pgjax.models.released import RELEASED

    config = RELEASED["Qwen3-VL-2B"]  # all its layers, but narrower in the middle
    return dataclasses.replace(config, text=dataclasses.replace(config.text, mlp=768, heads=8, kv_heads=4))


def write(folder: Path) -> None:
    """bfloat16 files of random bits that are finite numbers."""
    import jax
    import ml_dtypes
    import numpy as np

    from pgjax.config import MeshConfig
    from pgjax.models import checkpoint
    from pgjax.parallel.mesh import make_mesh
    from pgjax.train.setup import make_setup

    rng = np.random.default_rng(0)
    abstract = make_setup(model(), make_mesh(MeshConfig(), jax.devices()[:1])).abstract
    params = jax.tree.map(lambda x: rng.integers(0, 2**14, x.shape, np.uint16).view(ml_dtypes.bfloat16), abstract)
    checkpoint.FILE_BYTES = 512 * 2**20
    checkpoint.save_params(folder, params, model(), ml_dtypes.bfloat16)


def memory(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def load(folder: Path, dtype: str, devices: int) -> dict:
    import jax

    jax.config.update("jax_num_cpu_devices", devices)
    from pgjax.config import MeshConfig
    from pgjax.models.checkpoint import load_params, tensor_shapes
    from pgjax.parallel.mesh import make_mesh
    from pgjax.train.setup import make_setup

    setup = make_setup(model(), make_mesh(MeshConfig()))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), setup.abstract)
    files = list(folder.glob("*.safetensors"))
    before, peak, done = memory("RssAnon"), 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, memory("RssAnon"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    params = jax.block_until_ready(load_params(folder, abstract, setup.training))
    seconds, done = time.monotonic() - began, True
    watcher.join()
    size, share = sum(f.stat().st_size for f in files), sum(x.nbytes for x in jax.tree.leaves(params))
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "files": len(files),
        "file_gb": size / 1e9,
        "devices": devices,
        "dtype": dtype,
        "seconds": seconds,
        "gb_per_s": size / 1e9 / seconds,
        "share_gb": share / 1e9,
        "largest_tensor_gb": max(math.prod(s) for s in tensor_shapes(setup.abstract).values()) * jax.numpy.dtype(dtype).itemsize / 1e9,
        "largest_leaf_gb": max(x.nbytes for x in jax.tree.leaves(params)) / 1e9,  # a scanned one holds all layers
        "peak_gb": (peak - before) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the loaded parameters")
    parser.add_argument("--devices", type=int, default=8, help="simulated CPU devices")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # the loading process
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(load(Path(args.folder), args.dtype, args.devices)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        command = [sys.executable, __file__, "--folder", folder, "--dtype", args.dtype, "--devices", str(args.devices)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}).stdout
    row = json.loads(out)
    print(
        json.dumps(row)
        if args.json
        else "\n".join(f"{key:16} {value:.4g}" if isinstance(value, float) else f"{key:16} {value}" for key, value in row.items())
    )


if __name__ == "__main__":
    main()
