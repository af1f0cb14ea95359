"""Encode, prefill and decode: from prompts to sampled answers, each prompt computed once for its whole group."""

import jax
import jax.numpy as jnp
from flax import struct

from pgjax import automaton as answers
from pgjax.data.schema import PromptBatch
from pgjax.generate import law as laws
from pgjax.generate.lanes import Schedule, Slots, advance, empty, take_answers, take_prompts
from pgjax.generate.law import Law
from pgjax.models.attention import Segments
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.text import AnswerCache, Lanes, PromptCache
from pgjax.models.vision import Visual
from pgjax.parallel.mesh import batch_shards, constrain, take_rows


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
    """Prompt caches [L, P, K, T, C] and the hidden state of each prompt's last token."""
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731
    x = apply(batch.tokens_PT, batch.visual_PT, visual, method="embed")
    row = Segments.prompts(batch.length_P, batch.tokens_PT.shape[1])
    hidden, prompt = apply(x, batch.position_PTX, row, batch.visual_PT, visual, True, method="rows")
    last = jnp.take_along_axis(hidden, jnp.maximum(batch.length_P - 1, 0)[:, None, None], axis=1)[:, 0]
    return Prefill(jax.tree.map(lambda x: constrain(x, "layers", "batch", "kv_heads", None, None), prompt), last)


@struct.dataclass
class Held:
    """What decoding needs of the prompts that rows hold; leaves have leading axis N."""

    last_D: jax.Array  # hidden state of the prompt's last token
    position: jax.Array  # of the first answer token: it follows the prompt's M-RoPE
    sees_prompt_T: jax.Array  # bool
    start: jax.Array  # automaton state
    key_G: jax.Array
    outcome_J: jax.Array | None


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
    lanes: int = 0,
    rows: int = 0,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Rollout, Slots]:
    """G answers per prompt, each until it stops or has `law.limit` tokens, through `lanes` lanes (0: G) of `rows` rows (0: P; on a
    mesh a multiple of the devices that share the batch): generate/lanes.py. What is sampled depends on neither, but for rounding.

    All lanes write to one slot of their rings, which goes round: no answer is longer than a ring, so none overwrites itself.
    """
    (P, T), G, R, text = batch.tokens_PT.shape, group, law.limit, model.config.text
    N, S, W = rows or P, min(lanes or G, G), batch_shards(P)
    automaton, dtype = law.automaton, start.prompt.k_LPKTC.dtype
    prompts = Held(
        start.hidden_PD,
        batch.length_P + batch.delta_P,
        jnp.arange(T) < batch.length_P[:, None],
        automaton.start_M[modality_P].astype(jnp.int32),
        laws.answer_keys(key, step, batch.id_P, G),
        law.outcome_PJ if law.constrained else None,
    )
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731

    def hold(schedule: Schedule) -> tuple[Held, PromptCache]:
        if N == P:  # every row keeps its own prompt
            return prompts, start.prompt
        take = lambda axis: lambda x: take_rows(x, schedule.prompt_N, W, axis)  # noqa: E731
        return jax.tree.map(take(0), prompts), jax.tree.map(take(1), start.prompt)

    def begin(schedule: Schedule, held: Held, state_NS, hidden_NSD):
        """Free lanes begin answers."""
        schedule, fresh_NS = take_answers(schedule)
        hidden_NSD = jnp.where(fresh_NS[..., None], held.last_D[:, None], hidden_NSD)
        return schedule, jnp.where(fresh_NS, held.start[:, None], state_NS), hidden_NSD

    def one_token(held: Held, cache: PromptCache, carry):
        schedule, state_NS, hidden_NSD, own, written, slots, time = carry
        slots = slots.count(schedule)
        own_law = law.replace(outcome_PJ=held.outcome_J) if law.constrained else law
        logp_NSV = laws.log_probs(own_law, apply(hidden_NSD, method="logits"), state_NS, schedule.offset_NS)
        key_NS = jax.vmap(lambda key_G, sample_S: key_G[sample_S])(held.key_G, schedule.sample_NS)
        token_NS = laws.sample(logp_NSV, key_NS, schedule.offset_NS, greedy, top_k, top_p).astype(jnp.int32)
        logp_NS = jnp.take_along_axis(logp_NSV, token_NS[..., None], axis=-1)[..., 0]
        # Each token to its place among its prompt's answers; idle lanes write past the end, which is dropped.
        place_NS = (schedule.prompt_N[:, None] * G + schedule.sample_NS) * R + schedule.offset_NS
        place_WB = jnp.where(schedule.busy_NS, place_NS, P // W * G * R).reshape(W, -1)
        put = jax.vmap(lambda x, place, value: x.at[place].set(value, mode="drop"))
        written = [put(x, place_WB, value.reshape(W, -1)) for x, value in zip(written, (token_NS, logp_NS, state_NS), strict=True)]

        ended_NS = automaton.stop_V[token_NS] | (schedule.offset_NS + 1 >= R)
        state_NS = answers.step(automaton, state_NS, token_NS).astype(jnp.int32)
        # The position follows the prompt's M-RoPE, the cache slot is the step's: the two are not the same.
        position_NSX = jnp.broadcast_to((held.position[:, None] + schedule.offset_NS)[..., None], (N, S, 3))
        age_R = (time - jnp.arange(R)) % R
        context = Lanes(time % R, held.sees_prompt_T, age_R <= schedule.offset_NS[..., None])
        hidden_NSD, own = apply(apply(token_NS, method="embed"), position_NSX, context, cache, own, method="lanes")
        schedule, state_NS, hidden_NSD = begin(advance(schedule, ended_NS), held, state_NS, hidden_NSD)
        return schedule, state_NS, hidden_NSD, own, written, slots, time + 1

    def until_refill(carry):
        schedule, *rest = carry
        schedule = take_prompts(schedule)
        held, cache = hold(schedule)
        carry = (*begin(schedule, held, *rest[:2]), *rest[2:])
        running = lambda carry: carry[0].busy_NS.any() & ~carry[0].refill  # noqa: E731
        return jax.lax.while_loop(running, lambda carry: one_token(held, cache, carry), carry)

    ring = lambda *last: constrain(  # noqa: E731
        jnp.zeros((text.layers, N, text.kv_heads, S, *last), dtype), "layers", "batch", "kv_heads", None, None, None
    )
    rings = AnswerCache(ring(text.head_dim, R), ring(R, text.head_dim))
    answers_WB = [jnp.full((W, P // W * G * R), value) for value in (-1, 0.0, 0)]
    schedule = empty(P, G, N, S, W)
    hidden_NSD = jnp.zeros((N, S, text.width), start.hidden_PD.dtype)
    carry = schedule, schedule.sample_NS, hidden_NSD, rings, answers_WB, Slots.none(), jnp.int32(0)
    *_, answers_WB, slots, _ = jax.lax.while_loop(lambda carry: carry[0].busy_NS.any() | carry[0].refill, until_refill, carry)

    tokens_PGR, logp_PGR, state_PGR = (x.reshape(P, G, R) for x in answers_WB)
    length_PG = (tokens_PGR >= 0).sum(axis=-1, dtype=jnp.int32)
    tokens_PGR = jnp.maximum(tokens_PGR, 0)
    last = lambda x: jnp.take_along_axis(x, length_PG[..., None] - 1, axis=-1)[..., 0]  # noqa: E731
    final_PG = answers.step(automaton, last(state_PGR), last(tokens_PGR)).astype(jnp.int32)
    return Rollout(tokens_PGR, logp_PGR, state_PGR, length_PG, final_PG), slots
