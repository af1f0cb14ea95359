"""A jitted function that belongs to a mesh."""

from dataclasses import dataclass
from typing import Any

import jax

from pgjax.parallel.mesh import between_cpu_processes


def in_turn(out):
    """What a program gives; between CPU processes once it is there, as two programs at a time would mix up their messages."""
    if between_cpu_processes():
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
