"""The clipped policy loss with its KL and entropy terms, token by token, and how tokens become one number (PAPERS C5-C11; docs/losses.md).

Sums and counts stay apart until the last division, so that micro-batches, mini-batches and devices add up to the exact mean.
Axes: P packed rows, Q their answer tokens, G answers of a row, all its prompts' together; `sample_PQ` says whose token stands where.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pgjax.config import LossConfig

Aggregation = Literal["token_mean", "seq_mean", "seq_sum"]
Estimator = Literal["k1", "k2", "k3"]
Pair = tuple[jax.Array, jax.Array]

LOG_RATIO_MAX = 20.0  # nats; both log-ratios are clamped here before exp
KL_MAX = 10.0  # nats a token


def token_loss(
    logp: jax.Array,
    old: jax.Array,
    sampled: jax.Array,
    ref: jax.Array,
    entropy: jax.Array,
    advantage: jax.Array,
    mask: jax.Array,
    loss: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of every token and the metrics' tokens; all arrays of one shape, elementwise, in nats.

    `logp`, `old` and `ref` are the token's logprob under the policy, the policy that sampled, and the reference, by the scoring
    program; `sampled` is what the sampler itself gave it. Where `mask` is 0 everything is 0 whatever stands there, infinities
    included. Gradient conventions are PyTorch's: none outside a clamp, the full one on its border, half to each side where two
    branches are equal.
    """
    mask = mask > 0
    logp, old, sampled, ref, entropy, advantage = (jnp.where(mask, x, 0.0) for x in (logp, old, sampled, ref, entropy, advantage))
    log_ratio = _clamp(logp - old, -LOG_RATIO_MAX, LOG_RATIO_MAX)
    ratio = jnp.exp(log_ratio)
    plain = -advantage * ratio
    clipped = -advantage * _clamp(ratio, 1 - loss.clip_low, 1 + loss.clip_high)
    policy = jnp.maximum(plain, clipped)
    clipfrac, clipfrac_lower = clipped > plain, jnp.zeros_like(mask)
    if loss.dual_clip:  # bounds the loss of a bad answer that has become much more likely
        bound = -advantage * loss.dual_clip
        clipfrac_lower = (policy > bound) & (advantage < 0)
        policy = jnp.where(advantage < 0, jnp.minimum(bound, policy), policy)
    extra = {}
    if loss.tis_cap:  # the sampler's law is not quite the scorer's: weigh each token by their ratio, bounded above
        weight = jnp.minimum(jnp.exp(_clamp(old - sampled, -LOG_RATIO_MAX, LOG_RATIO_MAX)), loss.tis_cap)
        policy = policy * jax.lax.stop_gradient(weight)
        extra = {"actor/tis_weight": weight, "actor/tis_capped": weight >= loss.tis_cap}
    kl = kl_estimate(logp, ref, loss.kl)
    metrics = extra | {
        "actor/pg_loss": policy,
        "actor/kl_loss": kl,
        "actor/entropy": entropy,
        "actor/pg_clipfrac": clipfrac,
        "actor/pg_clipfrac_lower": clipfrac_lower,
        "actor/ppo_kl": -log_ratio,
        "training/rollout_probs_diff_mean": jnp.abs(jnp.exp(sampled) - jnp.exp(old)),
    }
    total = policy - loss.entropy_coef * entropy + loss.kl_coef * kl
    return total, {name: jax.lax.stop_gradient(value.astype(total.dtype)) for name, value in metrics.items()}


def kl_estimate(logp: jax.Array, ref: jax.Array, estimator: Estimator) -> jax.Array:
    """KL(policy || reference) from tokens of the policy, elementwise in nats: Schulman's k1 and k3 without bias, k2 with a small one.

    Gradients are those of the value. k3 is clamped, as verl does, and k1 and k2 are not.
    """
    if estimator == "k1":
        return logp - ref
    if estimator == "k2":
        return 0.5 * jnp.square(logp - ref)
    to_ref = _clamp(ref - logp, -LOG_RATIO_MAX, LOG_RATIO_MAX)
    return _clamp(jnp.exp(to_ref) - to_ref - 1, -KL_MAX, KL_MAX)


def _clamp(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clip with the full gradient on the borders (jnp.clip gives half)."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def per_token(value_PG: jax.Array, sample_PQ: jax.Array) -> jax.Array:
    """A value of each answer at each of its tokens [P, Q]; padding reads some answer and must be masked."""
    return jnp.take_along_axis(value_PG, jnp.clip(sample_PQ, 0, value_PG.shape[1] - 1), axis=1)


def answer_lengths(mask_PQ: jax.Array, sample_PQ: jax.Array, group: int) -> jax.Array:
    """Counted tokens of each answer [P, G], float32 or wider."""
    own_PQG = (sample_PQ[..., None] == jnp.arange(group)) & (mask_PQ > 0)[..., None]
    return own_PQG.sum(axis=1, dtype=jnp.promote_types(mask_PQ.dtype, jnp.float32))


def aggregate(values_PQ: jax.Array, mask_PQ: jax.Array, sample_PQ: jax.Array, group: int, limit: int, aggregation: Aggregation) -> Pair:
    """(sum, count) whose quotient is the mean over tokens, over answers of each answer's token mean, or of its token sum over `limit`.

    `mask_PQ` is 1 for tokens of answers, stop token included, in rows of weight above 0. Answers without such a token count nowhere.
    """
    weight_PQ = (mask_PQ > 0).astype(values_PQ.dtype)
    if aggregation == "seq_mean":
        length_PG = answer_lengths(mask_PQ, sample_PQ, group)
        weight_PQ /= per_token(jnp.maximum(length_PG, 1.0), sample_PQ).astype(values_PQ.dtype)
    return jnp.sum(jnp.where(mask_PQ > 0, values_PQ, 0.0) * weight_PQ), count(mask_PQ, sample_PQ, group, limit, aggregation)


def count(mask_PQ: jax.Array, sample_PQ: jax.Array, group: int, limit: int, aggregation: Aggregation) -> jax.Array:
    """What `aggregate` divides by: tokens, or answers with at least one token, these times the answer limit R for `seq_sum`.
    Known before any forward pass."""
    dtype = jnp.promote_types(mask_PQ.dtype, jnp.float32)
    if aggregation == "token_mean":
        return jnp.sum(mask_PQ > 0, dtype=dtype)
    answers = jnp.sum(answer_lengths(mask_PQ, sample_PQ, group) > 0, dtype=dtype)
    return answers * limit if aggregation == "seq_sum" else answers


def metric_pairs(
    metrics: dict[str, jax.Array], mask_PQ: jax.Array, sample_PQ: jax.Array, group: int, limit: int, aggregation: Aggregation
) -> dict[str, Pair]:
    """(sum, count) of each metric of `token_loss`: terms of the loss as the loss is aggregated, the others over tokens, as verl does."""
    terms = ("actor/pg_loss", "actor/kl_loss", "actor/entropy")
    return {
        name: aggregate(value_PQ, mask_PQ, sample_PQ, group, limit, aggregation if name in terms else "token_mean")
        for name, value_PQ in metrics.items()
    }
