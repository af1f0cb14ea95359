"""The language decoder of both families: grouped-query attention, M-RoPE, gated MLP; layers scanned.

Qwen2.5-VL has biases on q, k and v; Qwen3-VL has none, normalises q and k, interleaves M-RoPE and takes DeepStack features.

One module serves rows (prompts with packed answers: score, update, prefill), lanes (decode) and tokens behind a cache: what differs is
`context`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from pgjax.config import TextConfig
from pgjax.models.attention import Segments, attention, cached_attention, lane_attention
from pgjax.models.layers import NO_LORA, RESIDUAL, Embedding, GatedMLP, Linear, RMSNorm, rematerialised, rotate
from pgjax.models.vision import place
from pgjax.parallel.mesh import constrain


@struct.dataclass
class PromptCache:
    """Keys and values of the prompts by head, one row per prompt, shared by its group."""

    k_LPKTC: jax.Array
    v_LPKTC: jax.Array


@struct.dataclass
class AnswerCache:
    """Keys and values of the answers being decoded, one ring of R slots per head and lane; products over a ring need it whole.
    Keys have their channels first: XLA on CPUs then multiplies a query with all of them at once, without turning them."""

    k_LPKGCR: jax.Array
    v_LPKGRC: jax.Array


@struct.dataclass
class Lanes:
    """Context of one decode step: all lanes write to one slot of their rings, and read what is theirs."""

    slot: jax.Array  # scalar
    sees_prompt_PGT: jax.Array  # bool; G = 1: the same for all lanes
    sees_own_PGR: jax.Array  # bool; its new token's slot among them


@struct.dataclass
class Behind:
    """Context of Q given tokens of a row behind a cache of T slots: which of the S = T + Q keys each sees, the cache's first."""

    sees_PQS: jax.Array  # bool


def mrope(position: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """M-RoPE angles, cos and sin [..., C] float32, from positions [..., X]: the C / 2 frequencies are shared out to time, height
    and width, in contiguous sections (Qwen2.5-VL) or in turn, where what a section has not used up stays with time (Qwen3-VL)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    if config.mrope_interleaved:
        turn = jnp.arange(half) % 3
        component = jnp.where(jnp.arange(half) < 3 * jnp.asarray(config.mrope_section)[turn], turn, 0)
    else:
        component = jnp.repeat(jnp.arange(3), jnp.asarray(config.mrope_section), total_repeat_length=half)
    angle = position.astype(jnp.float32)[..., component] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


class SelfAttention(nn.Module):
    config: TextConfig
    dtype: jnp.dtype
    lora: tuple[int, float]

    @nn.compact
    def __call__(self, x, cos, sin, context, prompt: PromptCache | None, cache: AnswerCache | None, layer):
        c = self.config
        q, k, v = (
            Linear((n, c.head_dim), ("embed", axis, None), bias=c.qkv_bias, dtype=self.dtype, lora=self.lora, name=name)(x)
            for name, n, axis in (("q_proj", c.heads, "heads"), ("k_proj", c.kv_heads, "kv_heads"), ("v_proj", c.kv_heads, "kv_heads"))
        )
        if c.qk_norm:
            q, k = RMSNorm(c.eps, name="q_norm")(q), RMSNorm(c.eps, name="k_norm")(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if isinstance(context, Segments):
            q = constrain(q, "batch", None, "heads", None)
            k, v = (constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
            out = attention(q, k, v, context)
            saved = PromptCache(*(y.swapaxes(1, 2) for y in (k, v)))
        elif isinstance(context, Behind):
            k, v = (jnp.concatenate([y, new.swapaxes(1, 2)], axis=2) for y, new in ((prompt.k_LPKTC, k), (prompt.v_LPKTC, v)))
            out, saved = cached_attention(q, k, v, context.sees_PQS), None
        else:
            k, v = (y.swapaxes(1, 2)[None] for y in (k, v))
            cache = AnswerCache(
                jax.lax.dynamic_update_slice(cache.k_LPKGCR, k[..., None], (layer, 0, 0, 0, 0, context.slot)),
                jax.lax.dynamic_update_slice(cache.v_LPKGRC, v[..., None, :], (layer, 0, 0, 0, context.slot, 0)),
            )
            own_k, own_v = (jax.lax.dynamic_index_in_dim(y, layer, keepdims=False) for y in (cache.k_LPKGCR, cache.v_LPKGRC))
            out = lane_attention(q, prompt.k_LPKTC, prompt.v_LPKTC, own_k, own_v, context.sees_prompt_PGT, context.sees_own_PGR)
            saved = None
        back = dict(inputs=2, dtype=self.dtype, scale=RESIDUAL, lora=self.lora)
        return Linear((x.shape[-1],), ("heads", None, "embed"), name="o_proj", **back)(out), cache, saved


class DecoderLayer(nn.Module):
    config: TextConfig
    dtype: jnp.dtype
    lora: tuple[int, float]
    keep_cache: bool

    @nn.compact
    def __call__(self, carry, layer, prompt, cos, sin, context, deep):
        x, cache = carry
        x = constrain(x, "batch", None, None)
        norm = RMSNorm(self.config.eps, name="input_layernorm")(x)
        attention = SelfAttention(self.config, self.dtype, self.lora, name="self_attn")
        out, cache, saved = attention(norm, cos, sin, context, prompt, cache, layer)
        x = x + out
        mlp = GatedMLP(self.config.mlp, dtype=self.dtype, lora=self.lora, name="mlp")
        x = x + mlp(RMSNorm(self.config.eps, name="post_attention_layernorm")(x))
        x = x if deep is None else add_features(x, layer, *deep)
        return (x, cache), saved if self.keep_cache else None


def add_features(x: jax.Array, layer: jax.Array, visual_PT: jax.Array, deep_PNMD: jax.Array) -> jax.Array:
    """DeepStack: the layer's own features, where it has any, added to the stream [P, S, D] at the visual tokens, in its first slots."""

    def add(x):
        feature_PMD = jax.lax.dynamic_index_in_dim(deep_PNMD, layer, axis=1, keepdims=False)
        return x.at[:, : visual_PT.shape[1]].add(place(visual_PT, feature_PMD).astype(x.dtype))

    return jax.lax.cond(layer < deep_PNMD.shape[1], add, lambda x: x, x)


class TextDecoder(nn.Module):
    """Embeddings [P, S, D] -> final hidden states [P, S, D]; S slots of a row, lanes, or tokens behind a cache.

    `cache_out` makes a row pass return all its keys and values, a PromptCache; a lane pass takes one, and threads the AnswerCache through.
    `deep` (visual_PT, deep_PNMD) are the DeepStack features of a row pass.
    """

    config: TextConfig
    dtype: jnp.dtype
    remat: str
    lora: tuple[int, float] = NO_LORA  # rank and alpha of the adapters on every projection

    def setup(self):
        self.embed_tokens = Embedding(self.config.vocab, self.config.width, self.dtype)
        self.norm = RMSNorm(self.config.eps)

    @nn.compact
    def __call__(self, x, position, context, prompt=None, cache=None, cache_out=False, deep=None):
        cos, sin = mrope(position, self.config)
        layer = rematerialised(DecoderLayer, self.remat if cache is None and not cache_out else "none")
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.config.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        (x, cache), prompt_out = layers(self.config, self.dtype, self.lora, cache_out, name="layers")(
            (x, cache), jnp.arange(self.config.layers), prompt, cos, sin, context, deep
        )
        return self.norm(x), prompt_out if cache_out else cache
