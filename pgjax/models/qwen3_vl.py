"""The vision tower of Qwen3-VL: full blocks with LayerNorm, a learned grid of positions, and DeepStack features
(arXiv 2406.04334): what some blocks see is merged too and joins the first decoder layers."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pgjax.config import VisionConfig
from pgjax.models.layers import RESIDUAL, LayerNorm, Linear
from pgjax.models.vision import PatchEmbed, VisionAttention, Visual, scanned, vision_rope
from pgjax.parallel.mesh import constrain


class MLP(nn.Module):
    """Two layers; `approximate` is the tanh GELU of the blocks, the mergers have the exact one."""

    mlp: int
    width: int
    approximate: bool
    dtype: jnp.dtype
    scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = Linear((self.mlp,), ("embed", "mlp"), bias=True, dtype=self.dtype, name="linear_fc1")(x)
        x = nn.gelu(x, approximate=self.approximate)
        return Linear((self.width,), ("mlp", "embed"), bias=True, dtype=self.dtype, scale=self.scale, name="linear_fc2")(x)


class VisionBlock(nn.Module):
    """Carries the stream and, at the blocks that `slot` numbers (else it is -1), keeps it as a DeepStack feature."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, slot, cos, sin, image_PI):
        x_PID, deep_NPID = carry
        c, x_PID = self.config, constrain(x_PID, "batch", None, None)
        attention = VisionAttention(c, self.dtype, name="attn")
        x_PID = x_PID + attention(LayerNorm(name="norm1")(x_PID), cos, sin, image_PI, True)
        x_PID = x_PID + MLP(c.mlp, c.width, True, self.dtype, RESIDUAL, name="mlp")(LayerNorm(name="norm2")(x_PID))
        if c.deepstack:
            deep_NPID = jax.lax.cond(slot >= 0, lambda deep: deep.at[slot].set(x_PID), lambda deep: deep, deep_NPID)
        return (x_PID, deep_NPID), None


class Merger(nn.Module):
    """merge x merge neighbouring slots through an MLP; the norm is per patch, or in DeepStack (`joined`) over the joined ones."""

    config: VisionConfig
    width: int  # D of the decoder
    joined: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_PID):
        P, I, D = x_PID.shape
        unit, norm = self.config.merge**2, LayerNorm(name="norm")
        join = lambda x: x.reshape(P, I // unit, unit * D)  # noqa: E731
        x = norm(join(x_PID)) if self.joined else join(norm(x_PID))
        # The checkpoint has the MLP's two layers beside the norm, not one level below.
        x = Linear((unit * D,), ("embed", "mlp"), bias=True, dtype=self.dtype, name="linear_fc1")(x)
        return Linear((self.width,), ("mlp", "embed"), bias=True, dtype=self.dtype, name="linear_fc2")(nn.gelu(x, approximate=False))


class PositionGrid(nn.Module):
    """A learned side x side grid of positions, read bilinearly at every patch: a picture's corners lie on the grid's."""

    side: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, yx_PI2, grid_PI2):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        table = self.param("embedding", init, (self.side**2, self.width)).astype(self.dtype)
        at = yx_PI2 * (self.side - 1) / jnp.maximum(grid_PI2 - 1, 1)
        low = jnp.floor(at).astype(jnp.int32)
        out = 0.0
        for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
            tap = low + jnp.asarray(corner)
            weight = jnp.prod(1 - jnp.abs(at - tap), axis=-1)
            y, x = jnp.moveaxis(jnp.minimum(tap, self.side - 1), -1, 0)
            out = out + table[y * self.side + x] * weight[..., None]
        return out.astype(self.dtype)


class Tower(nn.Module):
    """patches [P, I, channels * temporal * patch^2], yx and grid [P, I, 2], image [P, I] -> visual tokens with DeepStack features."""

    config: VisionConfig
    out_width: int
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, patches_PIB, yx_PI2, grid_PI2, image_PI) -> Visual:
        c = self.config
        x = PatchEmbed(c.width, True, self.dtype, name="patch_embed")(patches_PIB)
        x = x + PositionGrid(c.positions, c.width, self.dtype, name="pos_embed")(yx_PI2, grid_PI2)
        cos, sin = vision_rope(yx_PI2, c.width // c.heads, c.rope_theta)
        slot_L = jnp.array([c.deepstack.index(n) if n in c.deepstack else -1 for n in range(c.depth)])
        carry = (x, jnp.zeros((len(c.deepstack), *x.shape), x.dtype))
        (x, deep_NPID), _ = scanned(VisionBlock, c.depth, self.remat)(c, self.dtype, name="blocks")(carry, slot_L, cos, sin, image_PI)
        merge = lambda cls, joined, name: cls(c, self.out_width, joined, self.dtype, name=name)  # noqa: E731
        tokens_PMD = merge(Merger, False, "merger")(x)
        if not c.deepstack:
            return Visual(tokens_PMD)
        each = nn.vmap(Merger, variable_axes={"params": 0}, split_rngs={"params": True}, metadata_params={nn.PARTITION_NAME: "layers"})
        deep_NPMD = merge(each, True, "deepstack_merger_list")(deep_NPID)
        return Visual(tokens_PMD, jnp.moveaxis(deep_NPMD, 0, 1))
