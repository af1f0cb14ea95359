"""The vision tower of Qwen2.5-VL: patches in, one visual token per merge x merge patches out.

Patches lie window-major (data/images.py), so a windowed block is plain attention over [windows, window_patches], and a
full block attends over every patch of the same image. Blocks are scanned; which kind one is, is data.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pgjax.config import VisionConfig
from pgjax.models.attention import segment_attention
from pgjax.models.layers import RESIDUAL, GatedMLP, Linear, RMSNorm, rotate
from pgjax.parallel.mesh import constrain


def vision_rope(yx_PI2: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Axial rotary angles: the first half of the frequencies turns with the row, the second with the column. [P, I, C] each."""
    frequency = theta ** -(jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
    angle = (yx_PI2[..., None].astype(jnp.float32) * frequency).reshape(*yx_PI2.shape[:2], head_dim // 2)
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


class VisionAttention(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_PID, cos, sin, image_PI, full):
        c, (P, I, D) = self.config, x_PID.shape
        head_dim = D // c.heads
        qkv = Linear((3, c.heads, head_dim), ("embed", None, "heads", None), bias=True, dtype=self.dtype, name="qkv")(x_PID)
        q, k, v = (constrain(y, "batch", None, "heads", None) for y in jnp.moveaxis(qkv, 2, 0))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        def windowed(q, k, v):
            n = c.window_patches
            q, k, v, segment = (y.reshape(P * (I // n), n, *y.shape[2:]) for y in (q, k, v, image_PI))
            return segment_attention(q, k, v, segment).reshape(P, I, c.heads, head_dim)

        out = jax.lax.cond(full, lambda q, k, v: segment_attention(q, k, v, image_PI), windowed, q, k, v)
        return Linear((D,), ("heads", None, "embed"), inputs=2, bias=True, dtype=self.dtype, scale=RESIDUAL, name="proj")(out)


class VisionBlock(nn.Module):
    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_PID, full, cos, sin, image_PI):
        x_PID = constrain(x_PID, "batch", None, None)
        attention = VisionAttention(self.config, self.dtype, name="attn")
        x_PID = x_PID + attention(RMSNorm(name="norm1")(x_PID), cos, sin, image_PI, full)
        return x_PID + GatedMLP(self.config.mlp, bias=True, dtype=self.dtype, name="mlp")(RMSNorm(name="norm2")(x_PID)), None


class Merger(nn.Module):
    """Norm per patch, then merge x merge neighbouring slots through a two-layer MLP with exact GELU."""

    config: VisionConfig
    width: int  # D of the decoder
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_PID):
        P, I, D = x_PID.shape
        unit = self.config.merge**2
        x = RMSNorm(name="ln_q")(x_PID).reshape(P, I // unit, unit * D)
        # Layer names are those of the checkpoint's nn.Sequential.
        x = Linear((unit * D,), ("embed", "mlp"), bias=True, dtype=self.dtype, name="mlp.0")(x)
        return Linear((self.width,), ("mlp", "embed"), bias=True, dtype=self.dtype, name="mlp.2")(nn.gelu(x, approximate=False))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size: one product per flattened patch."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches_PIB):
        return Linear((self.width,), ("patch", "embed"), dtype=self.dtype, name="proj")(patches_PIB)


class VisionTower(nn.Module):
    """patches [P, I, channels * temporal * patch^2], yx [P, I, 2], image [P, I] -> visual tokens [P, I / merge^2, D]."""

    config: VisionConfig
    out_width: int
    dtype: jnp.dtype
    remat: bool

    @nn.compact
    def __call__(self, patches_PIB, yx_PI2, image_PI):
        c = self.config
        x = PatchEmbed(c.width, self.dtype, name="patch_embed")(patches_PIB)
        cos, sin = vision_rope(yx_PI2, c.width // c.heads, c.rope_theta)
        full_L = jnp.isin(jnp.arange(c.depth), jnp.asarray(c.full_blocks, jnp.int32))
        block = nn.remat(VisionBlock, prevent_cse=False) if self.remat else VisionBlock
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(c, self.dtype, name="blocks")(x, full_L, cos, sin, image_PI)
        return Merger(c, self.out_width, self.dtype, name="merger")(x)
