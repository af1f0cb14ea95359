"""The suite runs on eight simulated CPU devices and keeps compiled programs between runs, outside the clone."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for devices
jax.config.update("jax_compilation_cache_dir", os.environ.get("PGJAX_CACHE") or str(Path.home() / ".cache" / "pgjax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_configure(config):
    config.addinivalue_line("markers", "parity: compares with transformers live; needs torch")
