"""Continuous batching: rows of a running batch take a prompt each when they are free and give one answer to it (G = 1), while the
others go on. Three programs over one state: `join`, `advance`, `closings`.

N rows lie on W shards of the batch, N / W on each. Prompts join W at a time, one a shard, and several rows of a shard may take the same
one: samples of one prompt are prefilled once. Which rows those are, and when, is decided on the host (serving/engine.py).
"""

import jax
import jax.numpy as jnp
from flax import struct

from pgjax import automaton as answers
from pgjax.config import TextConfig
from pgjax.data.schema import PromptBatch
from pgjax.generate import law as laws
from pgjax.generate.decode import Held, Running, begin, encode, nothing_running, one_token, prefill
from pgjax.generate.lanes import Schedule
from pgjax.generate.law import Law
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.text import Behind, PromptCache
from pgjax.parallel.mesh import TRAINING, replicated, spec, take_rows
from pgjax.parallel.mesh import rows as by_row


@struct.dataclass
class Asked:
    """How each row is to answer; leading axis N."""

    start: jax.Array  # int32 automaton state
    outcome_J: jax.Array  # bool: what the answer may name; read only where it is bound
    bound: jax.Array  # bool: the automaton decides which tokens may follow, and the answer ends with its last tag
    spare: jax.Array  # int32: of the R tokens, those that the answer must leave
    temperature: jax.Array  # float32; 0 is greedy
    seed: jax.Array  # uint32
    sample: jax.Array  # int32: which of the answers under this seed


@struct.dataclass
class Batch:
    running: Running
    held: Held
    asked: Asked
    cache: PromptCache


@struct.dataclass
class Tails:
    """Tokens that could stand in an answer, Q slots behind the answer in one row of each shard: forks, each a token that stands there with
    a stem behind it, and tails behind stems. A slot sees the answer before its fork, the fork's stem, and its own tail, up to itself."""

    tokens_WQ: jax.Array  # int32
    place_WQ: jax.Array  # int32, in the answer: the first of a fork is the token before it, -1 the prompt's last
    fork_WQ: jax.Array  # int32; -1: an empty slot
    tail_WQ: jax.Array  # int32; -1: of the stem
    first_WQ: jax.Array  # int32, place of the fork's first slot
    source_WQ: jax.Array  # int32, slot whose token comes before


def vacant(text: TextConfig, law: Law, rows: int, prompt_tokens: int, shards: int, dtype) -> Batch:
    """N = `rows` free rows for prompts of T = `prompt_tokens` and answers of R = `law.limit` tokens at most. `shards` W divides N."""
    A, J = law.automaton.distance_AJ.shape
    zeros = lambda *shape, dtype=jnp.int32: jnp.zeros((rows, *shape), dtype)  # noqa: E731
    own = jnp.tile(jnp.arange(rows // shards), shards)
    taken = jnp.full(shards, rows // shards)
    idle = Schedule(own, zeros() + 1, zeros(1), zeros(1), zeros(1) > 0, taken, rows // shards, 1)
    asked = Asked(zeros(), zeros(J, dtype=bool), zeros(dtype=bool), zeros(), zeros(dtype=jnp.float32), zeros(dtype=jnp.uint32), zeros())
    keys = laws.answer_keys(jax.random.key(0), 0, asked.seed, 1)
    held = Held(zeros(text.width, dtype=dtype), zeros(), zeros(prompt_tokens, dtype=bool), zeros(), keys, zeros(A, dtype=jnp.int16))
    cache = jnp.zeros((text.layers, rows, text.kv_heads, prompt_tokens, text.head_dim), dtype)
    return Batch(nothing_running(text, idle, law.limit, dtype), held, asked, PromptCache(cache, cache))


def shardings(batch: Batch, mesh) -> Batch:
    """How a batch (or its shapes) lies on a mesh: rows over the batch axes, caches by head too. A prefix of its tree."""
    rows, everywhere = by_row(mesh), replicated(mesh)
    heads = lambda x: jax.sharding.NamedSharding(  # noqa: E731
        mesh, spec(("layers", "batch", "kv_heads") + (None,) * (x.ndim - 3), x.shape, TRAINING, mesh)
    )
    running = batch.running
    fields = {name: rows for name in vars(running)} | {"own": jax.tree.map(heads, running.own), "slots": everywhere, "time": everywhere}
    return Batch(Running(**fields), rows, rows, jax.tree.map(heads, batch.cache))


def join(model: QwenVL, params, law: Law, batch: Batch, prompts: PromptBatch, asked: Asked, joins_N: jax.Array) -> Batch:
    """Rows `joins_N` (bool, free ones) take the prompt of their shard, W in all, and begin to answer as `asked` (of all rows) says."""
    N, W = len(joins_N), len(prompts.length_P)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: encode(model, params, prompts)))
    has_pictures = (prompts.image_PI >= 0).any()
    start = prefill(model, params, prompts, jax.lax.cond(has_pictures, lambda: encode(model, params, prompts), lambda: nothing))

    def put(new, old, axis: int):
        joins = joins_N.reshape((1,) * axis + (N,) + (1,) * (old.ndim - axis - 1))
        return jnp.where(joins, new, old)

    def spread(new, old, axis: int = 0):
        """Of each shard's prompt to its rows."""
        return jax.tree.map(lambda new, old: put(jnp.repeat(new, N // W, axis), old, axis), new, old)

    own = lambda new, old: jax.tree.map(lambda new, old: put(new, old, 0), new, old)  # noqa: E731
    asked = own(asked, batch.asked)
    sample_key = lambda seed, sample: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), sample)  # noqa: E731
    held = Held(
        spread(start.hidden_PD, batch.held.last_D),
        spread(prompts.length_P + prompts.delta_P, batch.held.position),
        spread(jnp.arange(prompts.tokens_PT.shape[1]) < prompts.length_P[:, None], batch.held.sees_prompt_T),
        asked.start,
        jax.vmap(sample_key)(asked.seed, asked.sample)[:, None],
        own(answers.distances(law.automaton, asked.outcome_J), batch.held.distance_A),
    )
    running, schedule = batch.running, batch.running.schedule
    empty = put(-1, running.tokens_WB.reshape(N, -1), 0).reshape(running.tokens_WB.shape)
    running = running.replace(schedule=schedule.replace(begun_N=put(0, schedule.begun_N, 0)), tokens_WB=empty)
    return Batch(begin(running, held), held, asked, spread(start.prompt, batch.cache, 1))


def advance(model: QwenVL, params, law: Law, batch: Batch, drop_N: jax.Array, steps: int) -> Batch:
    """At most `steps` tokens for every row that answers; fewer when an answer ends, so that another prompt may take its row at once.
    Rows `drop_N` (bool) are freed before."""
    automaton, asked, R = law.automaton, batch.asked, batch.running.limit
    schedule = batch.running.schedule
    schedule = schedule.replace(busy_NS=schedule.busy_NS & ~drop_N[:, None])

    def pick(held: Held, logits_NSV, state_NS, schedule: Schedule):
        used_NS = schedule.offset_NS + asked.spare[:, None]
        bound = law.replace(distance_PA=held.distance_A, constrained=True)
        logp_NSV = laws.log_probs(bound, logits_NSV, state_NS, used_NS, free_PS=~asked.bound[:, None])
        token_NS = laws.sample_at(logp_NSV, held.key_G, schedule.offset_NS, asked.temperature[:, None])
        logp_NS = jnp.take_along_axis(logp_NSV, token_NS[..., None], axis=-1)[..., 0]
        whole_NS = asked.bound[:, None] & automaton.parsed_A[answers.step(automaton, state_NS, token_NS)]
        return token_NS, logp_NS, automaton.stop_V[token_NS] | whole_NS | (used_NS + 1 >= R)

    begun = batch.running.replace(schedule=schedule, time=batch.running.time % R)  # a server's steps outgrow an int32
    going = lambda r: (r.time - begun.time < steps) & (r.schedule.busy_NS == schedule.busy_NS).all() & schedule.busy_NS.any()  # noqa: E731
    one = lambda r: one_token(model, params, automaton, r, batch.held, batch.cache, pick)  # noqa: E731
    return batch.replace(running=jax.lax.while_loop(going, one, begun))


def closings(model: QwenVL, params, law: Law, batch: Batch, row_W: jax.Array, tails: Tails) -> jax.Array:
    """Logprobs float32 [W, Q] of the tails' tokens behind the answers of rows `row_W` (one of each shard, as numbered there).

    Nothing is computed twice: one forward pass over the tails, which read the caches of the prompt and of the answer (DESIGN idea 2). Right
    after an answer's last token only: the rings go round while others run.
    """
    W, R, running = len(row_W), batch.running.limit, batch.running
    apply = lambda *a, **k: model.apply({"params": params}, *a, **k)  # noqa: E731
    take = lambda tree, axis=0: jax.tree.map(lambda x: take_rows(x, row_W, W, axis), tree)  # noqa: E731
    cache, own = take(batch.cache, 1), take(running.own, 1)
    behind = PromptCache(
        jnp.concatenate([cache.k_LPKTC, own.k_LPKGCR[:, :, :, 0].swapaxes(-1, -2)], axis=3),
        jnp.concatenate([cache.v_LPKTC, own.v_LPKGRC[:, :, :, 0]], axis=3),
    )
    position_W, sees_WT, length_W = take((batch.held.position, batch.held.sees_prompt_T, running.schedule.offset_NS[:, 0]))
    # The token before a fork is fed again and sees what came before it: of the prompt too, where it is the prompt's last.
    first = tails.first_WQ[..., None]
    of_prompt = sees_WT[:, None] & (jnp.arange(sees_WT.shape[1]) < sees_WT.sum(-1)[:, None, None] + jnp.minimum(first, 0))
    place_WR = length_W[:, None] - 1 - (running.time - 1 - jnp.arange(R)) % R  # of the answer's token in each slot of its ring
    of_answer = (place_WR[:, None] >= 0) & (place_WR[:, None] < first)
    key = lambda x_WQ: x_WQ[:, None]  # noqa: E731
    same = (tails.fork_WQ[..., None] == key(tails.fork_WQ)) & ((key(tails.tail_WQ) < 0) | (key(tails.tail_WQ) == tails.tail_WQ[..., None]))
    of_tails = same & (key(tails.place_WQ) <= tails.place_WQ[..., None])
    position_WQX = jnp.broadcast_to((position_W[:, None] + tails.place_WQ)[..., None], (*tails.place_WQ.shape, 3))
    context = Behind(jnp.concatenate([of_prompt, of_answer, of_tails], axis=-1))
    hidden_WQD = apply(apply(tails.tokens_WQ, method="embed"), position_WQX, context, behind, method="behind")
    before_WQD = jnp.take_along_axis(hidden_WQD, tails.source_WQ[..., None], axis=1)
    logp_WQV = laws.log_probs(law.replace(constrained=False), apply(before_WQD, method="logits"), tails.place_WQ, 0)
    return jnp.take_along_axis(logp_WQV, tails.tokens_WQ[..., None], axis=-1)[..., 0]
