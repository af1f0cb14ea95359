"""What the vision towers of both families share: patches in, one visual token per merge x merge patches out.

Patches lie window-major (data/images.py): a windowed block attends within runs of `window_patches` slots, a full block over every
patch of the same image. Blocks are scanned; which kind one is, is data.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from pgjax.config import VisionConfig
from pgjax.models.attention import Segments, attention
from pgjax.models.layers import RESIDUAL, Linear, rematerialised, rotate
from pgjax.parallel.mesh import constrain


@struct.dataclass
class Visual:
    """Visual tokens of prompts, M = I / merge^2, in the order of their slots."""

    tokens_PMD: jax.Array  # D is the decoder's width
    deep_PNMD: jax.Array | None = None  # DeepStack: N further features of each, for the first N decoder layers

    def by_row(self, visual_PT: jax.Array, rows: int) -> tuple[jax.Array, "Visual"]:
        """Where visual tokens stand, and they, with the prompts of a row joined: P prompts -> `rows` rows."""
        (P, T), (_, M, D) = visual_PT.shape, self.tokens_PMD.shape
        n = P // rows
        number = jnp.where(visual_PT >= 0, visual_PT + (jnp.arange(P) % n * M)[:, None], -1).reshape(rows, n * T)
        join = lambda x: jnp.moveaxis(x.reshape(rows, n, -1, M, D), 1, 2).reshape(rows, -1, n * M, D)  # noqa: E731
        return number, Visual(self.tokens_PMD.reshape(rows, n * M, D), None if self.deep_PNMD is None else join(self.deep_PNMD))


def place(visual_PT: jax.Array, feature_PMD: jax.Array) -> jax.Array:
    """Features [P, T, D] at the prompt slots that their tokens stand at; 0 at text."""
    placed = jnp.take_along_axis(feature_PMD, jnp.maximum(visual_PT, 0)[..., None], axis=1)
    return jnp.where((visual_PT >= 0)[..., None], placed, 0)


def vision_rope(yx_PI2: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Axial rotary angles: the first half of the frequencies turns with the row, the second with the column. [P, I, C] each."""
    frequency = theta ** -(jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
    angle = (yx_PI2[..., None].astype(jnp.float32) * frequency).reshape(*yx_PI2.shape[:2], head_dim // 2)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


class VisionAttention(nn.Module):
    """Attention of every patch to those of its window, or of its image where `full` (a traced bool) says so."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_PID, cos, sin, image_PI, full):
        c, (_, I, D) = self.config, x_PID.shape
        head_dim = D // c.heads
        qkv = Linear((3, c.heads, head_dim), ("embed", None, "heads", None), bias=True, dtype=self.dtype, name="qkv")(x_PID)
        q, k, v = (constrain(y, "batch", None, "heads", None) for y in jnp.moveaxis(qkv, 2, 0))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        window_PI = jnp.where(image_PI >= 0, jnp.arange(I) // c.window_patches, -1)
        out = attention(q, k, v, Segments.pictures(jnp.where(full, image_PI, window_PI) if c.window else image_PI))
        return Linear((D,), ("heads", None, "embed"), inputs=2, bias=True, dtype=self.dtype, scale=RESIDUAL, name="proj")(out)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size: one product per flattened patch."""

    width: int
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches_PIB):
        return Linear((self.width,), ("patch", "embed"), bias=self.bias, dtype=self.dtype, name="proj")(patches_PIB)


def scanned(block: type[nn.Module], depth: int, remat: str) -> type[nn.Module]:
    """`block` as `depth` blocks over a carry; its first argument after the carry has a leading axis of blocks, the rest is shared."""
    return nn.scan(
        rematerialised(block, remat),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
