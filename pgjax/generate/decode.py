"""Encode, prefill and decode: from prompts to sampled answers, each prompt computed once for its whole group."""

import jax
import jax.numpy as jnp
from flax import struct

from pgjax import automaton as answers
from pgjax.data.schema import PromptBatch
from pgjax.generate import law as laws
from pgjax.generate.law import Law
from pgjax.models.attention import Row
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.text import AnswerCache, Lanes, PromptCache
from pgjax.models.vision import Visual
from pgjax.parallel.mesh import constrain


@struct.dataclass
class Prefill:
    prompt: PromptCache
    hidden_PD: jax.Array  # of each prompt's last token: its logits are those of the first answer token


@struct.dataclass
class Rollout:
    """Sampled answers. An answer runs to its stop token inclusive, or to R tokens; slots behind it are zero."""

    tokens_PGR: jax.Array  # int32
    logp_PGR: jax.Array  # float32, under the law they were drawn from
    state_PGR: jax.Array  # int32, automaton state before each token
    length_PG: jax.Array  # int32
    final_PG: jax.Array  # int32, automaton state at the end: the verdict is read from it


def encode(model: QwenVL, params, batch: PromptBatch) -> Visual:
    """Visual tokens, once per prompt."""
    return model.apply({"params": params}, batch.patches_PIB, batch.patch_yx_PI2, batch.grid_PI2, batch.image_PI, method="encode")


def prefill(model: QwenVL, params, batch: PromptBatch, visual: Visual) -> Prefill:
    """Prompt caches [L, P, T, K, C] and the hidden state of each prompt's last token."""
    P, T = batch.tokens_PT.shape
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731
    x = apply(batch.tokens_PT, batch.visual_PT, visual, method="embed")
    row = Row(batch.length_P, jnp.zeros((P, 0), jnp.int32), T, 1)
    hidden, prompt = apply(x, batch.position_PTX, row, batch.visual_PT, visual, True, method="rows")
    last = jnp.take_along_axis(hidden, jnp.maximum(batch.length_P - 1, 0)[:, None, None], axis=1)[:, 0]
    return Prefill(prompt, last)


def decode(
    model: QwenVL,
    params,
    batch: PromptBatch,
    modality_P: jax.Array,
    start: Prefill,
    law: Law,
    key: jax.Array,
    step: jax.Array,
    *,
    group: int,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollout:
    """G answers per prompt through G lanes, until all have stopped or reached `law.limit` tokens.

    Lane state is per lane, so that a lane may later hold one answer after another; here each holds one.
    """
    (P, _), G, R, text = batch.tokens_PT.shape, group, law.limit, model.config.text
    key_PG = laws.answer_keys(key, step, batch.id_P, G)
    automaton, dtype = law.automaton, start.prompt.k_LPTKC.dtype
    lanes_like = jnp.zeros((text.layers, P, G, R, text.kv_heads, text.head_dim), dtype)
    lanes_like = constrain(lanes_like, "layers", "batch", None, None, "kv_heads", None)
    rollout = Rollout(
        tokens_PGR=jnp.zeros((P, G, R), jnp.int32),
        logp_PGR=jnp.zeros((P, G, R), jnp.float32),
        state_PGR=jnp.zeros((P, G, R), jnp.int32),
        length_PG=jnp.zeros((P, G), jnp.int32),
        final_PG=jnp.broadcast_to(automaton.start_M[modality_P][:, None], (P, G)).astype(jnp.int32),
    )
    hidden_PGD = jnp.broadcast_to(start.hidden_PD[:, None], (P, G, text.width))

    def running(carry):
        _, _, _, done_PG, offset = carry
        return (offset < R) & ~done_PG.all()

    def one_token(carry):
        rollout, hidden_PGD, cache, done_PG, offset = carry
        logits = model.apply({"params": params}, hidden_PGD, method="logits")
        logp_PGV = laws.log_probs(law, logits, rollout.final_PG, offset)
        token_PG = jnp.where(done_PG, 0, laws.sample(logp_PGV, key_PG, offset, greedy, top_k, top_p)).astype(jnp.int32)
        logp_PG = jnp.where(done_PG, 0.0, jnp.take_along_axis(logp_PGV, token_PG[..., None], axis=-1)[..., 0])
        write = lambda x, value: jax.lax.dynamic_update_index_in_dim(x, value, offset, axis=2)  # noqa: E731
        rollout = Rollout(
            tokens_PGR=write(rollout.tokens_PGR, token_PG),
            logp_PGR=write(rollout.logp_PGR, logp_PG),
            state_PGR=write(rollout.state_PGR, rollout.final_PG),
            length_PG=rollout.length_PG + ~done_PG,
            final_PG=jnp.where(done_PG, rollout.final_PG, answers.step(automaton, rollout.final_PG, token_PG)).astype(jnp.int32),
        )
        done_PG = done_PG | automaton.stop_V[token_PG]
        # The position follows the prompt's M-RoPE, the cache slot is the offset: the two are not the same.
        position_PG = jnp.broadcast_to((batch.length_P + batch.delta_P + offset)[:, None], (P, G))
        x_PGD = model.apply({"params": params}, token_PG, method="embed")
        position_PGX = jnp.broadcast_to(position_PG[..., None], (P, G, 3))
        lanes = Lanes(batch.length_P, offset)
        hidden_PGD, cache = model.apply({"params": params}, x_PGD, position_PGX, lanes, start.prompt, cache, method="lanes")
        return rollout, hidden_PGD, cache, done_PG, offset + 1

    carry = (rollout, hidden_PGD, AnswerCache(lanes_like, lanes_like), jnp.zeros((P, G), bool), jnp.int32(0))
    return jax.lax.while_loop(running, one_token, carry)[0]
