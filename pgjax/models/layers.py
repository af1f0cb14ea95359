"""Linear, norm, embedding and rotary position layers. Parameters state shape, axes and initialiser where they are declared.

Kernels keep heads as axes of their own, `[D, H, C]`, so that sharding never cuts through a head; the loader
reshapes a checkpoint's `[H * C, D]` by the leaf's shape (models/checkpoint.py).
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from pgjax.parallel.mesh import constrain

NO_LORA = (0, 1.0)  # rank and alpha of an adapter; rank 0: none
RESIDUAL = 0.01  # a fresh layer hardly disturbs the stream, so that tokens stay apart while a small model starts to learn


# What of a layer is kept for the backward pass, beside its input: the rest is computed anew.
KEPT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # its output and log-sum-exp
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer for scanning under one of the policies of `ModelConfig.remat`; "none" keeps everything."""
    return layer if remat == "none" else nn.remat(layer, prevent_cse=False, policy=KEPT[remat])


class Linear(nn.Module):
    """y = x . kernel (+ bias) over the trailing `inputs` axes of x. Kernel and bias are float32, the product in `dtype`.

    With a `lora` rank fresh parameters have an adapter, and y += (x . lora_a) . lora_b * alpha / rank (Hu et al. 2021; lora_b starts
    at zero). Parameters without it are those of the base model: the adapter is off where it is not there.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axes of the kernel: inputs, then features
    inputs: int = 1
    bias: bool = False
    dtype: jnp.dtype = jnp.float32
    scale: float = 1.0  # of the initial variance: RESIDUAL where the output is added to a residual stream
    lora: tuple[int, float] = NO_LORA

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-self.inputs :] + self.features
        init = nn.initializers.variance_scaling(
            self.scale, "fan_in", "normal", in_axis=tuple(range(self.inputs)), out_axis=tuple(range(self.inputs, len(shape)))
        )
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape)
        y = self.product(x, kernel)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.inputs :])
            y = y + self.param("bias", zeros, self.features).astype(self.dtype)
        rank, alpha = self.lora
        if rank and (self.is_initializing() or self.has_variable("params", "lora_a")):
            normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=tuple(range(self.inputs)))
            down = nn.with_logical_partitioning(normal, (*self.axes[: self.inputs], None))
            up = nn.with_logical_partitioning(nn.initializers.zeros, (None, *self.axes[self.inputs :]))
            lora_a = self.param("lora_a", down, (*shape[: self.inputs], rank)).astype(self.dtype)
            lora_b = self.param("lora_b", up, (rank, *self.features)).astype(self.dtype)
            y = y + jnp.tensordot(jnp.tensordot(x.astype(self.dtype), lora_a, self.inputs), lora_b, 1) * (alpha / rank)
        return y

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """x . kernel as a product of matrices: of more axes XLA transposes the operands of gradients, on CPUs element by element."""
        shape, width = x.shape[: -self.inputs] + self.features, math.prod(x.shape[-self.inputs :])
        # A sharded axis of features stays one, unless it leads.
        features = self.features if any(self.axes[self.inputs + 1 :]) else (math.prod(self.features),)
        x, kernel = x.reshape(-1, width), kernel.reshape(width, *features)
        return jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), 1).reshape(shape)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, the statistics in float32 (as the reference model rounds: scale after the cast)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * x32.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis, in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (None,)), x.shape[-1:])
        x32 = x.astype(jnp.float32)
        x32 = x32 - x32.mean(-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps) * scale + bias).astype(x.dtype)


class Embedding(nn.Module):
    """Table [V, D]; `attend` multiplies by its transpose (the tied head)."""

    vocab: int
    width: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab, self.width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = constrain(self.embedding.astype(self.dtype), "vocab", None)  # gathered over fsdp before the look-up, not after
        return constrain(table[tokens], "batch", None, None)

    def attend(self, x: jax.Array) -> jax.Array:
        return x @ self.embedding.astype(self.dtype).T


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), width D through F."""

    mlp: int
    bias: bool = False
    dtype: jnp.dtype = jnp.float32
    lora: tuple[int, float] = NO_LORA

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        same = dict(bias=self.bias, dtype=self.dtype, lora=self.lora)
        wide = dict(features=(self.mlp,), axes=("embed", "mlp")) | same
        hidden = nn.silu(Linear(**wide, name="gate_proj")(x)) * Linear(**wide, name="up_proj")(x)
        return Linear((x.shape[-1],), ("mlp", "embed"), scale=RESIDUAL, name="down_proj", **same)(hidden)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split form. x [..., heads, C]; cos and sin [..., C] float32, broadcast over heads."""
    half = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-half[1], half[0]], axis=-1)
    return (x * cos[..., None, :] + turned * sin[..., None, :]).astype(x.dtype)
