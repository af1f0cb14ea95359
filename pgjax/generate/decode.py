"""Encode, prefill and decode: from prompts to sampled answers, each prompt computed once for its whole group."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.config import TextConfig
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


# (what the rows hold, logits [N, S, V], automaton states [N, S], schedule) -> token, logprob, and whether the answer ends: [N, S] each
Pick = Callable[["Held", jax.Array, jax.Array, Schedule], tuple[jax.Array, jax.Array, jax.Array]]


@struct.dataclass
class Held:
    """What decoding needs of the prompts that rows hold; leaves have leading axis N."""

    last_D: jax.Array  # hidden state of the prompt's last token
    position: jax.Array  # of the first answer token: it follows the prompt's M-RoPE
    sees_prompt_T: jax.Array  # bool
    start: jax.Array  # automaton state
    key_G: jax.Array
    distance_A: jax.Array | None  # of a constrained law


@struct.dataclass
class Running:
    """Answers on their way, in N rows of S lanes (generate/lanes.py). All lanes write to one slot of their rings, which goes round: no
    answer is longer than a ring, so none overwrites itself. What is written lies by shard, prompt, answer and place, -1 behind an end."""

    schedule: Schedule
    state_NS: jax.Array
    hidden_NSD: jax.Array  # of the token before
    own: AnswerCache
    tokens_WB: jax.Array
    logp_WB: jax.Array
    state_WB: jax.Array
    slots: Slots
    time: jax.Array

    @property
    def limit(self) -> int:
        """R"""
        return self.own.v_LPKGRC.shape[-2]


def nothing_running(text: TextConfig, schedule: Schedule, limit: int, dtype) -> Running:
    (N, S), W = schedule.busy_NS.shape, len(schedule.queue_W)
    ring = lambda *last: constrain(  # noqa: E731
        jnp.zeros((text.layers, N, text.kv_heads, S, *last), dtype), "layers", "batch", "kv_heads", None, None, None
    )
    rings = AnswerCache(ring(text.head_dim, limit), ring(limit, text.head_dim))
    written = [jnp.full((W, schedule.prompts * schedule.group * limit), value) for value in (-1, 0.0, 0)]
    return Running(schedule, schedule.sample_NS, jnp.zeros((N, S, text.width), dtype), rings, *written, Slots.none(), jnp.int32(0))


def begin(running: Running, held: Held) -> Running:
    """Free lanes begin answers."""
    schedule, fresh_NS = take_answers(running.schedule)
    hidden_NSD = jnp.where(fresh_NS[..., None], held.last_D[:, None], running.hidden_NSD)
    return running.replace(schedule=schedule, state_NS=jnp.where(fresh_NS, held.start[:, None], running.state_NS), hidden_NSD=hidden_NSD)


def one_token(model: QwenVL, params, automaton: Automaton, running: Running, held: Held, cache: PromptCache, pick: Pick) -> Running:
    """Every lane's next token, as `pick` chooses it; lanes whose answers end begin others."""
    r, schedule = running, running.schedule
    (N, S), R, W = schedule.busy_NS.shape, r.limit, len(schedule.queue_W)
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731
    token_NS, logp_NS, ended_NS = pick(held, apply(r.hidden_NSD, method="logits"), r.state_NS, schedule)
    # Each token to its place among its prompt's answers; idle lanes write past the end, which is dropped.
    place_NS = (schedule.prompt_N[:, None] * schedule.group + schedule.sample_NS) * R + schedule.offset_NS
    place_WB = jnp.where(schedule.busy_NS, place_NS, r.tokens_WB.shape[1]).reshape(W, -1)
    put = jax.vmap(lambda x, place, value: x.at[place].set(value, mode="drop"))
    write = lambda x, value_NS: put(x, place_WB, value_NS.reshape(W, -1))  # noqa: E731

    # The position follows the prompt's M-RoPE, the cache slot is the step's: the two are not the same.
    position_NSX = jnp.broadcast_to((held.position[:, None] + schedule.offset_NS)[..., None], (N, S, 3))
    age_R = (r.time - jnp.arange(R)) % R
    context = Lanes(r.time % R, held.sees_prompt_T[:, None], age_R <= schedule.offset_NS[..., None])
    hidden_NSD, own = apply(apply(token_NS, method="embed"), position_NSX, context, cache, r.own, method="lanes")
    return begin(
        Running(
            advance(schedule, ended_NS),
            answers.step(automaton, r.state_NS, token_NS),
            hidden_NSD,
            own,
            write(r.tokens_WB, token_NS),
            write(r.logp_WB, logp_NS),
            write(r.state_WB, r.state_NS),
            r.slots.count(schedule),
            r.time + 1,
        ),
        held,
    )


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
    """
    (P, T), G, R = batch.tokens_PT.shape, group, law.limit
    N, S, W = rows or P, min(lanes or G, G), batch_shards(P)
    automaton = law.automaton
    prompts = Held(
        start.hidden_PD,
        batch.length_P + batch.delta_P,
        jnp.arange(T) < batch.length_P[:, None],
        automaton.start_M[modality_P].astype(jnp.int32),
        laws.answer_keys(key, step, batch.id_P, G),
        law.distance_PA,
    )

    def hold(schedule: Schedule) -> tuple[Held, PromptCache]:
        if N == P:  # every row keeps its own prompt
            return prompts, start.prompt
        take = lambda axis: lambda x: take_rows(x, schedule.prompt_N, W, axis)  # noqa: E731
        return jax.tree.map(take(0), prompts), jax.tree.map(take(1), start.prompt)

    def pick(held: Held, logits_NSV, state_NS, schedule: Schedule):
        logp_NSV = laws.log_probs(law.replace(distance_PA=held.distance_A), logits_NSV, state_NS, schedule.offset_NS)
        key_NS = jax.vmap(lambda key_G, sample_S: key_G[sample_S])(held.key_G, schedule.sample_NS)
        token_NS = laws.sample(logp_NSV, key_NS, schedule.offset_NS, greedy, top_k, top_p).astype(jnp.int32)
        logp_NS = jnp.take_along_axis(logp_NSV, token_NS[..., None], axis=-1)[..., 0]
        return token_NS, logp_NS, automaton.stop_V[token_NS] | (schedule.offset_NS + 1 >= R)

    def until_refill(running: Running) -> Running:
        running = running.replace(schedule=take_prompts(running.schedule))
        held, cache = hold(running.schedule)
        going = lambda r: r.schedule.busy_NS.any() & ~r.schedule.refill  # noqa: E731
        one = lambda r: one_token(model, params, automaton, r, held, cache, pick)  # noqa: E731
        return jax.lax.while_loop(going, one, begin(running, held))

    running = nothing_running(model.config.text, empty(P, G, N, S, W), R, start.prompt.k_LPKTC.dtype)
    done = jax.lax.while_loop(lambda r: r.schedule.busy_NS.any() | r.schedule.refill, until_refill, running)

    tokens_PGR, logp_PGR, state_PGR = (x.reshape(P, G, R) for x in (done.tokens_WB, done.logp_WB, done.state_WB))
    length_PG = (tokens_PGR >= 0).sum(axis=-1, dtype=jnp.int32)
    tokens_PGR = jnp.maximum(tokens_PGR, 0)
    last = lambda x: jnp.take_along_axis(x, length_PG[..., None] - 1, axis=-1)[..., 0]  # noqa: E731
    final_PG = answers.step(automaton, last(state_PGR), last(tokens_PGR)).astype(jnp.int32)
    return Rollout(tokens_PGR, logp_PGR, state_PGR, length_PG, final_PG), done.slots
