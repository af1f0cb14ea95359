"""A jitted function that belongs to a mesh."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Program:
    """Called with arrays it runs; `trace`d with shapes it can be compiled for devices that are not here (plan/)."""

    jitted: Any
    out: Any  # shardings of what it gives, a prefix of its tree
    mesh: jax.sharding.Mesh

    def __call__(self, *args, **kwargs):
        with jax.set_mesh(self.mesh):
            return self.jitted(*args, **kwargs)

    def trace(self, *args, **kwargs):
        """Its jaxpr, which can be lowered."""
        with jax.set_mesh(self.mesh):
            return self.jitted.trace(*args, **kwargs)
