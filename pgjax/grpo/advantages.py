"""Group-relative advantages: each answer is judged against the other answers to its prompt (PAPERS C3, C4; docs/losses.md).

Beside them stand what shapes the reward before, and which groups are worth an update. Axes: P prompts, G answers, K groups kept.
"""

import jax
import jax.numpy as jnp

from pgjax.config import LossConfig


def advantages(
    reward_PG: jax.Array, kl_PG: jax.Array, loss: LossConfig, weight_P: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Advantage [P, G] of every answer, and scalar statistics of the batch.

    `kl_PG` is the sum over an answer's tokens of `losses.kl_estimate(old, ref, loss.kl_reward)`, by default k1, which can be
    negative; `loss.kl_in_reward` times it is taken from the reward. Each group is centred, on its mean or each answer on the
    mean of the others, and divided by its std plus `loss.std_eps`; a group of one keeps its value (mean 0, std 1). Rows of
    weight 0 get advantage 0 and enter no statistic.

    `frac_zero_std` is the share of groups whose rewards are all equal, measured before any KL enters: with KL in the reward
    such a group still gets advantages of full size, which say nothing but "lower KL" (PAPERS C4).
    """
    weight_P = jnp.ones(reward_PG.shape[0], reward_PG.dtype) if weight_P is None else weight_P.astype(reward_PG.dtype)
    score_PG = reward_PG - loss.kl_in_reward * kl_PG if loss.kl_in_reward else reward_PG
    mean_P1, std_P1 = _moments(score_PG, 0 if loss.std == "ddof0" else 1)
    advantage_PG, group = score_PG - mean_P1, score_PG.shape[1]
    if loss.baseline == "leave_one_out":
        advantage_PG *= group / max(group - 1, 1)  # what is left of the mean when an answer is taken out of it
    if loss.std != "off":
        advantage_PG /= std_P1 + loss.std_eps
    advantage_PG = jnp.where(weight_P[:, None] > 0, advantage_PG, 0.0)

    def mean(value_P: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weight_P > 0, value_P, 0.0) * weight_P) / jnp.maximum(weight_P.sum(), 1.0)

    stats = {
        "rewards/mean": mean(reward_PG.mean(axis=1)),
        "rewards/max": jnp.max(reward_PG, initial=0.0, where=weight_P[:, None] > 0),
        "rewards/min": jnp.min(reward_PG, initial=jnp.inf, where=weight_P[:, None] > 0),
        "group_std": mean(reward_PG.std(axis=1)),
        "frac_zero_std": mean((~informative(reward_PG, weight_P)).astype(reward_PG.dtype)),
        "sequence_kl": mean(kl_PG.mean(axis=1)),
    }
    return advantage_PG, stats


def _moments(score_PG: jax.Array, ddof: int) -> tuple[jax.Array, jax.Array]:
    """Mean and std of each group as [P, 1]."""
    group = score_PG.shape[1]
    if group == 1:
        return jnp.zeros_like(score_PG), jnp.ones_like(score_PG)
    # Seen from the first answer, equal scores have mean and std of exactly 0; a rounded mean would be blown up by 1 / eps.
    first_P1 = score_PG[:, :1]
    return first_P1 + (score_PG - first_P1).mean(axis=1, keepdims=True), (score_PG - first_P1).std(axis=1, ddof=ddof, keepdims=True)


def overlong_penalty(length_PG: jax.Array, limit: int, buffer: int) -> jax.Array:
    """DAPO's soft penalty, to be added to the reward: 0 up to `limit - buffer` tokens (stop token included), then falling in a
    line to -1 at `limit`, which an answer cut there also gets. `buffer` is at least 1."""
    return jnp.clip((limit - buffer - length_PG) / buffer, -1.0, 0.0)


def informative(reward_PG: jax.Array, weight_P: jax.Array) -> jax.Array:
    """bool [P]: groups that count and whose rewards differ. The others have no advantage to learn from."""
    return (reward_PG.max(axis=1) > reward_PG.min(axis=1)) & (weight_P > 0)


def select(informative_P: jax.Array, keep: int) -> tuple[jax.Array, jax.Array]:
    """DAPO's dynamic sampling with static shapes: which `keep` of P sampled groups to train on, int32 [K], and their weight, float32 [K].

    Informative groups come first, in their order; where they are too few others fill the batch with weight 0.
    """
    index_K = jnp.argsort(~informative_P, stable=True)[:keep]
    return index_K, informative_P[index_K].astype(jnp.float32)
