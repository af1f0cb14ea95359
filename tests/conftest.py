"""The suite runs on eight simulated CPU devices and keeps compiled programs between runs, outside the clone."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# With XLA's concurrent schedule, simulated devices reach independent collectives in different orders and wait for ever. So they do
# when one device's waiting collectives take all threads of the pool, which has as many as there are devices unless NPROC says more.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ.setdefault("NPROC", "64")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for devices
jax.config.update("jax_compilation_cache_dir", os.environ.get("PGJAX_CACHE") or str(Path.home() / ".cache" / "pgjax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

gc.set_threshold(100_000, 50, 1000)  # traced programs stay: to look through them again and again takes a fifth of the time


@pytest.fixture(autouse=True, scope="module")
def _no_traces_from_before():
    """What was traced before decides how often a program repeats an inner function, and so its key among the compiled ones: with nothing
    from before, a file finds its programs again whichever files ran before it, in whichever process."""
    jax.clear_caches()
    gc.collect()
