"""A jitted function that belongs to a mesh."""

from dataclasses import dataclass
from typing import Any

import jax


def in_turn(out):
    """What a program gives; between CPU processes once it is there. Gloo tells messages apart by their order alone, and two programs that
    run at a time mix up theirs."""
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(out)
    return out


@dataclass(frozen=True)
class Program:
    """Called with arrays it runs; `trace`d with shapes it can be compiled for devices that are not here (plan/)."""

    jitted: Any
    out: Any  # shardings of what it gives, a prefix of its tree
    mesh: jax.sharding.Mesh

    def __call__(self, *args, **kwargs):
        with jax.set_mesh(self.mesh):
            return in_turn(self.jitted(*args, **kwargs))

    def trace(self, *args, **kwargs):
        """Its jaxpr, which can be lowered."""
        with jax.set_mesh(self.mesh):
            return self.jitted.trace(*args, **kwargs)
