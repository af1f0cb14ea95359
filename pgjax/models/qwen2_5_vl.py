"""The vision tower of Qwen2.5-VL: windowed and full blocks with RMSNorm and a gated MLP."""

import jax.numpy as jnp
from flax import linen as nn

from pgjax.config import VisionConfig
from pgjax.models.layers import GatedMLP, Linear, RMSNorm
from pgjax.models.vision import PatchEmbed, VisionAttention, Visual, scanned, vision_rope
from pgjax.parallel.mesh import constrain


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


class Tower(nn.Module):
    """patches [P, I, channels * temporal * patch^2], yx [P, I, 2], image [P, I] -> visual tokens."""

    config: VisionConfig
    out_width: int
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, patches_PIB, yx_PI2, grid_PI2, image_PI) -> Visual:
        c = self.config
        x = PatchEmbed(c.width, False, self.dtype, name="patch_embed")(patches_PIB)
        cos, sin = vision_rope(yx_PI2, c.width // c.heads, c.rope_theta)
        full_L = jnp.isin(jnp.arange(c.depth), jnp.asarray(c.full_blocks, jnp.int32))
        x, _ = scanned(VisionBlock, c.depth, self.remat)(c, self.dtype, name="blocks")(x, full_L, cos, sin, image_PI)
        return Visual(Merger(c, self.out_width, self.dtype, name="merger")(x))
