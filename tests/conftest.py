"""The suite runs on eight simulated CPU devices and keeps compiled programs between runs, outside the clone."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# With XLA's concurrent schedule, simulated devices reach independent collectives in different orders and wait for ever. So they do
# when one device's waiting collectives take all threads of the pool, which has as many as there are devices unless NPROC says more.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ.setdefault("NPROC", "64")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for devices
jax.config.update("jax_compilation_cache_dir", os.environ.get("PGJAX_CACHE") or str(Path.home() / ".cache" / "pgjax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
