"""What the benchmarks share: the machine in words, a median of timings, rows as a Markdown table or as JSON."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax


def machine() -> dict[str, str | int]:
    """Processor, cores, device, and the versions that figures depend on; packages that are not there are left out."""
    device, info = jax.devices()[0], Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found: dict[str, str | int] = {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count() or 1,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
    }
    for package in ("jax", "flax", "torch", "transformers", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def median_seconds(f: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median wall time of `f()` over `repeats` calls, arrays in its result included; `warm_up` calls (compilation) go before."""
    seconds = []
    for _ in range(warm_up + repeats):
        began = time.perf_counter()
        jax.block_until_ready(f())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[warm_up:])


def show(rows: list[dict], as_json: bool, title: str) -> None:
    """Print rows of equal keys: one JSON object {machine, command, rows}, or a Markdown table below its title and the machine."""
    if as_json:
        print(json.dumps({"machine": machine(), "command": " ".join(["python", *sys.argv]), "rows": rows}))
        return
    print(title, "; ".join(f"{name} {value}" for name, value in machine().items()), sep="\n\n", end="\n\n")
    print("|", " | ".join(rows[0]), "|")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("|", " | ".join(_cell(value) for value in row.values()), "|")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
