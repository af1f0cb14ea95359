"""Qwen2.5-VL and Qwen3-VL as pure functions: `model.apply({"params": params}, ..., method=...)`.

The parameter tree is the checkpoint: visual.*, model.*, lm_head (absent when the head is tied).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from pgjax.config import ModelConfig
from pgjax.models import qwen2_5_vl, qwen3_vl
from pgjax.models.attention import Segments
from pgjax.models.layers import Linear
from pgjax.models.text import AnswerCache, Behind, Lanes, TextDecoder
from pgjax.models.vision import Visual, place

TOWERS = {"qwen2_5_vl": qwen2_5_vl.Tower, "qwen3_vl": qwen3_vl.Tower}


class QwenVL(nn.Module):
    config: ModelConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        self.visual = TOWERS[c.family](c.vision, c.text.width, dtype, c.remat)
        self.model = TextDecoder(c.text, dtype, c.remat, (c.lora_rank, c.lora_alpha))
        if not c.text.tied:
            self.lm_head = Linear((c.text.vocab,), ("embed", "vocab"), dtype=dtype)

    def encode(self, patches_PIB, yx_PI2, grid_PI2, image_PI) -> Visual:
        """Image patches -> visual tokens."""
        return self.visual(patches_PIB, yx_PI2, grid_PI2, image_PI)

    def embed(self, tokens: jax.Array, visual_PT=None, visual: Visual | None = None) -> jax.Array:
        """Token embeddings; where `visual_PT` >= 0 the visual token of that number stands instead."""
        x = self.model.embed_tokens(tokens)
        if visual is None:
            return x
        return jnp.where((visual_PT >= 0)[..., None], place(visual_PT, visual.tokens_PMD).astype(x.dtype), x)

    def rows(self, x, position_PSX, row: Segments, visual_PT, visual: Visual, cache_out: bool = False):
        """Rows of prompts and their packed answers -> hidden states [P, S, D] (and the keys and values of all slots)."""
        deep = None if visual.deep_PNMD is None else (visual_PT, visual.deep_PNMD)
        hidden, prompt = self.model(x, position_PSX, row, cache_out=cache_out, deep=deep)
        return (hidden, prompt) if cache_out else hidden

    def lanes(self, x_PGD, position_PGX, lanes: Lanes, prompt, cache: AnswerCache):
        """One token per lane -> hidden states [P, G, D] and the grown answer cache."""
        return self.model(x_PGD, position_PGX, lanes, prompt, cache)

    def behind(self, x_PQD, position_PQX, context: Behind, prompt) -> jax.Array:
        """Given tokens behind a cache -> hidden states [P, Q, D]."""
        return self.model(x_PQD, position_PQX, context, prompt)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32 logits [..., V]."""
        out = self.model.embed_tokens.attend(hidden) if self.config.text.tied else self.lm_head(hidden)
        return out.astype(jnp.float32)

    def __call__(self, patches_PIB, yx_PI2, grid_PI2, image_PI, tokens_PT, visual_PT, position_PTX, length_P):
        """Logits of plain prompts [P, T, V]; also what touches every parameter at init."""
        visual = self.encode(patches_PIB, yx_PI2, grid_PI2, image_PI)
        row = Segments.prompts(length_P, tokens_PT.shape[1])
        return self.logits(self.rows(self.embed(tokens_PT, visual_PT, visual), position_PTX, row, visual_PT, visual))


def patch_values(config: ModelConfig) -> int:
    """Numbers in one flattened patch."""
    v = config.vision
    return v.channels * v.temporal * v.patch**2


def init_boxed(model: QwenVL, key: jax.Array):
    """Fresh parameters with their logical axes (boxed); run it under `jax.eval_shape` for shapes alone."""
    P, T, I = 1, 8, model.config.vision.window_patches
    ints = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    patches = jnp.zeros((P, I, patch_values(model.config)))
    places = ints(P, I, 2), ints(P, I, 2), ints(P, I)
    return model.init(key, patches, *places, ints(P, T), ints(P, T), ints(P, T, 3), jnp.full((P,), T))["params"]
