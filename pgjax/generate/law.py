"""The law of answer tokens: the one distribution that is sampled, scored and updated (DESIGN section 6).

Logits are divided by the temperature, never-sampled vocabulary is removed, and under a constraint so is every token after
which the answer could not be completed in the tokens left. Top-k and top-p cut the sampler alone: they are for use, not
for training, where the scored law must be the sampled one.
"""

import jax
import jax.numpy as jnp
from flax import struct

from pgjax import automaton as answers

BLOCKED = -1e30


@struct.dataclass
class Law:
    blocked_V: jax.Array  # bool: image and vision tokens, vocabulary rows past the tokenizer's
    automaton: answers.Automaton
    distance_PA: jax.Array | None  # int16: tokens to the end of an answer that this prompt allows (automaton.distances); if constrained
    limit: int = struct.field(pytree_node=False)  # R, stop token included
    temperature: float = struct.field(pytree_node=False, default=1.0)
    constrained: bool = struct.field(pytree_node=False, default=False)


def log_probs(
    law: Law,
    logits_PSV: jax.Array,
    state_PS: jax.Array,
    offset: jax.Array,
    prompt_PS: jax.Array | int = 0,
    free_PS: jax.Array | bool = False,
) -> jax.Array:
    """Normalised float32 log-probabilities [P, S, V]. `state_PS` is the automaton's state before the token, `offset` (scalar
    or [P, S]) the number of answer tokens before it, `prompt_PS` which of the row's prompts it answers (there may be more than
    rows, in their order), `free_PS` where a constrained law does not constrain. Removed tokens get about -1e30, never -inf."""
    logits = logits_PSV.astype(jnp.float32) / law.temperature
    blocked = law.blocked_V
    if law.constrained:
        remaining_PS, prompt_PS = jnp.broadcast_to(law.limit - offset, state_PS.shape), jnp.broadcast_to(prompt_PS, state_PS.shape)
        allowed_PSV = answers.allowed(law.automaton, state_PS, remaining_PS, law.distance_PA, prompt_PS)
        blocked = blocked | ~(allowed_PSV | jnp.asarray(free_PS)[..., None])
    return jax.nn.log_softmax(jnp.where(blocked, BLOCKED, logits), axis=-1)


def answer_keys(key: jax.Array, step: jax.Array, id_P: jax.Array, group: int) -> jax.Array:
    """One key per (step, prompt id, sample): draws depend on nothing else, so not on mesh, batch or process. [P, G]"""
    key = jax.random.fold_in(key, step)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(lambda i: fold(jax.random.fold_in(key, i), jnp.arange(group)))(id_P)


def _truncate(logp: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Keep the k likeliest tokens, then the fewest whose mass reaches p."""
    if top_k:
        kth = jax.lax.top_k(logp, top_k)[0][..., -1:]
        logp = jnp.where(logp >= kth, logp, BLOCKED)
    if top_p < 1.0:
        logp = jax.nn.log_softmax(logp)  # of what top-k left; the cut below compares with these very numbers
        ordered = jnp.sort(logp, axis=-1, descending=True)
        before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
        last = jnp.sum(before < top_p, axis=-1, keepdims=True) - 1
        logp = jnp.where(logp >= jnp.take_along_axis(ordered, last, axis=-1), logp, BLOCKED)
    return logp


def sample(logp_PGV: jax.Array, key_PG: jax.Array, offset_PG: jax.Array, greedy: bool, top_k: int, top_p: float) -> jax.Array:
    """Token ids [P, G]: the likeliest, or a draw by Gumbel noise from the key folded with the offset."""
    if greedy:
        return jnp.argmax(logp_PGV, axis=-1)
    return jnp.argmax(_truncate(logp_PGV, top_k, top_p) + _noise(key_PG, offset_PG, logp_PGV.shape[-1]), axis=-1)


def sample_at(logp_PGV: jax.Array, key_PG: jax.Array, offset_PG: jax.Array, temperature_PG: jax.Array) -> jax.Array:
    """Token ids [P, G], drawn at a temperature each; 0 is greedy. Where all are, no noise is made."""
    noise = lambda: _noise(key_PG, offset_PG, logp_PGV.shape[-1]) * temperature_PG[..., None]  # noqa: E731
    noise_PGV = jax.lax.cond((temperature_PG > 0).any(), noise, lambda: jnp.zeros_like(logp_PGV))
    return jnp.argmax(logp_PGV + noise_PGV, axis=-1).astype(jnp.int32)


def _noise(key_PG: jax.Array, offset_PG: jax.Array, V: int) -> jax.Array:
    """Gumbel noise [P, G, V] from each key folded with the offset."""
    draw = lambda key, offset: jax.random.gumbel(jax.random.fold_in(key, offset), (V,))  # noqa: E731
    return jax.vmap(jax.vmap(draw))(key_PG, offset_PG)
