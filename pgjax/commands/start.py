"""What the subcommands share: jax before its first use, a recipe, keys and policies from files."""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgjax.parallel.start import find_group, joined


def start_jax(devices: int) -> None:
    """Before the first use of a device: simulated CPU devices if asked for, and the persistent compilation cache."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from pgjax.train.materials import cache_dir

    if devices:
        # With XLA's concurrent schedule, simulated devices reach independent collectives in different orders and wait for ever; so they
        # do when one device's waiting collectives take all threads of a pool that has one for each device (unless NPROC says more).
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ.setdefault("NPROC", str(8 * devices))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextmanager
def started(devices: int, args: argparse.Namespace) -> Iterator[bool]:
    """A training command, alone or as one of several processes (see parallel/start.py); yields whether it is the one that prints.

    `devices` are simulated ones of all processes together; 0: each takes those that it has.
    """
    group = find_group(args.coordinator, args.processes, args.process, simulated=devices > 0)
    processes = group.processes if group else 1
    if devices % processes:
        raise ValueError(f"{devices} simulated devices do not divide over {processes} processes; change devices and mesh")
    start_jax(devices // processes)
    with joined(group) as first:
        yield first


def recipe_of(args: argparse.Namespace, rest: list[str]):
    from pgjax.recipes import load_recipe, override, validate

    recipe = load_recipe(args.config)
    if folder := override(recipe, rest).checkpoint:
        from pgjax.models.hf_config import with_checkpoint

        recipe = with_checkpoint(dataclasses.replace(recipe, checkpoint=folder))
    return validate(override(recipe, rest))


def read_key(flag: str, file: str | None, variable: str | None = None) -> str | None:
    """A key from a file, or else from the environment, where an empty variable is none."""
    where, text = f"the variable {variable}", os.environ.get(variable or "")
    if file is not None:
        where = f"{flag} {file}"
        try:
            text = Path(file).read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} cannot be read as ASCII text: {getattr(error, 'strerror', None) or error}") from error
    if file is None and not text:
        return None
    if not re.fullmatch("[!-~]+", key := (text or "").strip()):
        raise ValueError(f"{where} must hold one word of ASCII, the key")
    return key


def read_policy(file: str | None) -> str | None:
    if file is None:
        return None
    from pgjax.taxonomy import parse_taxonomy

    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        parse_taxonomy(text, file, brief=True)  # complains before a model is loaded
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--policy {file} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error


def no_more(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; see --help")
