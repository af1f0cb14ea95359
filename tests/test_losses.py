"""Loss and advantages against golden numbers worked out in float64, and the additivity that sharding rests on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.config import LOSS_PRESETS, LossConfig
from pgjax.grpo.advantages import advantages
from pgjax.grpo.losses import aggregate, count, metric_pairs, per_token, token_loss
from pgjax.train.update import mean

PROGUARD = LOSS_PRESETS["proguard"]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def golden():
    """Four answers of at most three tokens as one padded group: mask, reward, old, ref, new, entropy."""
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], float)
    reward = np.array([3.0, 2.5, 2.0, 0.0])
    old = np.array([[-0.10, -0.50, -1.20], [-0.30, -0.70, 0], [-2.0, -0.05, -0.40], [-0.90, 0, 0]])
    ref = np.array([[-0.15, -0.40, -1.00], [-0.25, -0.90, 0], [-1.5, -0.10, -0.40], [-1.3, 0, 0]])
    new = np.array([[-0.05, -0.80, -1.10], [-0.60, -0.40, 0], [-1.0, -0.05, -0.70], [-0.10, 0, 0]])
    entropy = np.array([[0.5, 0.7, 0.9], [0.4, 0.6, 0], [1.0, 0.2, 0.3], [0.8, 0, 0]])
    return mask, reward, old, ref, new, entropy


SAMPLE_PADDED = np.repeat(np.arange(4), 3)[None]  # row of 12 slots: answer of each


def padded(loss=PROGUARD):
    """The golden group as [1, 12] arrays: (logp, old, sampled, ref, entropy, advantage), mask, sample. `sampled` is not read here."""
    mask, reward, old, ref, new, entropy = golden()
    advantage, _ = advantages(jnp.array(reward)[None], jnp.array((mask * (old - ref)).sum(1))[None], loss)
    row = [jnp.array(x).reshape(1, 12) for x in (new, old, old + jnp.nan, ref, entropy)]
    return [*row, per_token(advantage, SAMPLE_PADDED)], jnp.array(mask).reshape(1, 12), jnp.array(SAMPLE_PADDED)


def packed(loss=PROGUARD):
    """The same without gaps, rubbish in the one slot left over."""
    arrays, mask, sample = padded(loss)
    keep = np.flatnonzero(np.asarray(mask[0]))
    rubbish = [jnp.nan, jnp.inf, jnp.inf, -jnp.inf, jnp.nan, 7.0]
    arrays = [jnp.concatenate([x[:, keep], jnp.full((1, 1), bad)], axis=1) for x, bad in zip(arrays, rubbish, strict=True)]
    mask = jnp.concatenate([mask[:, keep], jnp.zeros((1, 1))], axis=1)
    return arrays, mask, jnp.concatenate([sample[:, keep], jnp.full((1, 1), -1)], axis=1)


def finish(total, number, loss):
    """As the update divides."""
    return mean(total, number + loss.agg_eps)


def means(arrays, mask, sample, loss):
    tokens, metrics = token_loss(*arrays, mask, loss)
    whole = finish(*aggregate(tokens, mask, sample, 4, 3, loss.aggregation), loss)
    return whole, {name: finish(*pair, loss) for name, pair in metric_pairs(metrics, mask, sample, 4, 3, loss.aggregation).items()}


def test_advantage_golden():
    mask, reward, old, ref, _, _ = golden()
    kl = (mask * (old - ref)).sum(1)
    got, stats = advantages(jnp.array(reward)[None], jnp.array(kl)[None], PROGUARD)
    want = [0.8555247768703304, 0.47505922183435867, 0.09535398965017741, -1.4259379883548664]
    np.testing.assert_allclose(got[0], want, atol=1e-12, rtol=0)
    assert stats["frac_zero_std"] == 0 and stats["rewards/mean"] == reward.mean()


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize(
    "clip, loss_value, policy, clipfrac",
    [
        (0.2, -0.06136160681861356, -0.056401878319413616, 0.2222222219753086),
        (0.1, -0.05453214352827561, -0.04957241502907567, 0.3333333329629629),
    ],
)
def test_loss_golden(layout, clip, loss_value, policy, clipfrac):
    config = replace(PROGUARD, clip_low=clip, clip_high=clip)
    mean, metrics = means(*layout(config), config)
    want = {
        "actor/pg_loss": policy,
        "actor/kl_loss": 0.10402714941333879,
        "actor/entropy": 0.5999999993333333,
        "actor/pg_clipfrac": clipfrac,
        "actor/pg_clipfrac_lower": 0.0,
    }
    np.testing.assert_allclose(mean, loss_value, atol=1e-12, rtol=0)
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-12, rtol=0, err_msg=name)
    mask, _, old, _, new, _ = golden()
    np.testing.assert_allclose(metrics["actor/ppo_kl"], (mask * (old - new)).sum() / (mask.sum() + 1e-8), atol=1e-12)


def one_token(loss, **values):
    """Loss and its gradient in logp of a single token; all but advantage, which is 1, default to 0."""
    given = {"logp": 0.0, "old": 0.0, "sampled": 0.0, "ref": 0.0, "entropy": 0.0, "advantage": 1.0} | values
    logp, *rest = (jnp.array(given[name]) for name in ("logp", "old", "sampled", "ref", "entropy", "advantage"))
    return jax.value_and_grad(lambda x: token_loss(x, *rest, jnp.ones(()), loss)[0])(logp)


BARE = replace(PROGUARD, entropy_coef=0.0, kl_coef=0.0)


def test_dual_clip_token():
    advantage = -1.4259379883548664
    value, grad = one_token(BARE, logp=1.8, advantage=advantage)
    np.testing.assert_allclose(value, 4.277813965064599, atol=1e-12)
    assert grad == 0
    value, grad = one_token(replace(BARE, dual_clip=0.0), logp=1.8, advantage=advantage)
    np.testing.assert_allclose([value, grad], 8.626422135661116, atol=1e-12)
    metrics = token_loss(*(jnp.array(x) for x in (1.8, 0.0, 0.0, 0.0, 0.0, advantage)), jnp.ones(()), BARE)[1]
    assert metrics["actor/pg_clipfrac_lower"] == 1 and metrics["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize(
    "values, want",
    [
        ({"advantage": 2.0}, -2.0),  # ratio 1: both branches equal, halves add up
        ({"logp": 0.5, "advantage": 2.0}, 0.0),  # clipped above
        ({"logp": -0.5, "advantage": 2.0}, -2.0 * np.exp(-0.5)),  # below, but the plain branch is larger
        ({"logp": -0.5, "advantage": -2.0}, 0.0),  # clipped below
        ({"logp": 0.5, "advantage": -2.0}, 2.0 * np.exp(0.5)),
        ({"logp": np.log(3.0), "advantage": -1.0}, None),  # on the dual clip's border, see below
        ({"logp": 25.0, "advantage": -1e-6}, 0.0),  # outside the clamp of the log-ratio
        ({"logp": 0.3, "advantage": 0.0}, 0.0),
    ],
)
def test_gradient_conventions(values, want):
    _, grad = one_token(BARE, **values)
    if want is None:  # rounding decides whether exp(log 3) ties with 3; all three are right
        assert min(abs(grad - x) for x in (0.0, 1.5, 3.0)) < 1e-12
    else:
        np.testing.assert_allclose(grad, want, atol=1e-12)


def test_ties_split_in_half():
    # ratio 2 on the upper border of the clip: full gradient from both branches; dual clip at 2: half from min.
    config = replace(BARE, clip_high=1.0, dual_clip=2.0)
    ratio = float(jnp.exp(jnp.log(2.0)))
    assert ratio == 2.0
    np.testing.assert_allclose(one_token(config, logp=np.log(2.0), advantage=-1.0)[1], 1.0, atol=1e-12)
    np.testing.assert_allclose(one_token(config, logp=np.log(2.0), advantage=1.0)[1], -2.0, atol=1e-12)


def test_k3_gradient_and_clamps():
    config = replace(PROGUARD, entropy_coef=0.0, kl_coef=1.0)
    value, grad = one_token(config, ref=0.7, advantage=0.0)
    np.testing.assert_allclose([value, grad], [np.exp(0.7) - 1.7, 1 - np.exp(0.7)], atol=1e-12)
    value, grad = one_token(config, ref=5.0, advantage=0.0)  # k3 is 142 there
    assert value == 10 and grad == 0
    value, grad = one_token(config, ref=-25.0, advantage=0.0)
    assert value == 10 and grad == 0


def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logp, old, ref = (rng.normal(size=(4, 64)) * 2 for _ in range(3))
    advantage, entropy = rng.normal(size=(4, 64)), rng.random((4, 64))
    logp[:, :8] = old[:, :8]
    mask = rng.random((4, 64)) < 0.8
    x = torch.tensor(logp, requires_grad=True)
    o, r, a = (torch.tensor(v) for v in (old, ref, advantage))
    ratio = torch.exp(torch.clamp(x - o, -20, 20))
    m = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 0.8, 1.2))
    m = torch.where(a < 0, torch.min(-a * 3, m), m)
    d = torch.clamp(r - x, -20, 20)
    total = m - 0.01 * torch.tensor(entropy) + 0.01 * torch.clamp(torch.exp(d) - d - 1, -10, 10)
    (total * torch.tensor(mask)).sum().backward()

    def jax_total(lp):
        return jnp.sum(token_loss(lp, old, old, ref, entropy, advantage, mask, PROGUARD)[0] * mask)

    value, grad = jax.value_and_grad(jax_total)(jnp.array(logp))
    np.testing.assert_allclose(value, (total.detach().numpy() * mask).sum(), atol=1e-10)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-12)


def test_masked_slots_give_no_gradient_and_no_nan():
    arrays, mask, sample = packed()
    for aggregation in ("token_mean", "seq_mean", "seq_sum"):
        config = replace(PROGUARD, aggregation=aggregation)
        grad = jax.grad(lambda lp, config=config: means([lp, *arrays[1:]], mask, sample, config)[0])(arrays[0])
        assert jnp.isfinite(grad).all() and grad[0, -1] == 0


def test_constant_group():
    reward, kl = jnp.full((1, 4), 3.0), jnp.array([[2.0, 5, 1, 4]])
    got, stats = advantages(reward, kl, PROGUARD)
    std = 0.0018257418583505958
    np.testing.assert_allclose(got[0], [0.001 / (std + 1e-6) * x for x in (1, -2, 2, -1)], atol=1e-12)
    np.testing.assert_allclose(got[0], [0.5474, -1.0948, 1.0948, -0.5474], atol=1e-4)
    assert stats["frac_zero_std"] == 1
    got, stats = advantages(reward, kl, LOSS_PRESETS["grpo"])
    assert (got == 0).all() and stats["frac_zero_std"] == 1


def test_equal_rewards_are_exactly_zero_in_float32():
    reward = jnp.full((1, 16), 2.7, jnp.float32)  # the rounded mean of these is not 2.7
    got, _ = advantages(reward, jnp.zeros_like(reward), LOSS_PRESETS["grpo"])
    assert got.dtype == jnp.float32 and (got == 0).all()


@pytest.mark.parametrize("std, want", [("ddof1", 1 / np.sqrt(2)), ("ddof0", 1.0), ("off", 0.5)])
def test_std_modes(std, want):
    config = LossConfig(std=std, std_eps=0.0, kl_in_reward=0.0)
    got, _ = advantages(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)), config)
    np.testing.assert_allclose(got[0], [-want, want], atol=1e-12)


def test_group_of_one_and_rows_of_weight_zero():
    got, _ = advantages(jnp.array([[2.5]]), jnp.zeros((1, 1)), PROGUARD)
    np.testing.assert_allclose(got, 2.5 / (1 + 1e-6), atol=1e-12)
    reward = jnp.array([[1.0, 2.0], [jnp.nan, 9.0], [3.0, 3.0]])
    got, stats = advantages(reward, jnp.zeros((3, 2)), PROGUARD, jnp.array([1.0, 0.0, 1.0]))
    assert (got[1] == 0).all() and stats["frac_zero_std"] == 0.5 and stats["rewards/mean"] == 2.25


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum"])
def test_packed_equals_padded(aggregation):
    config = replace(PROGUARD, aggregation=aggregation)
    (one, metrics_one), (two, metrics_two) = means(*padded(config), config), means(*packed(config), config)
    np.testing.assert_allclose(one, two, atol=1e-14)
    for name in metrics_one:
        np.testing.assert_allclose(metrics_one[name], metrics_two[name], atol=1e-14)


def batch(seed=0, prompts=6, group=3, slots=20):
    """Packed rows of random lengths, some answers empty, the last row of weight 0."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, size=(prompts, group))
    lengths[-1] = 0
    sample, mask = np.full((prompts, slots), -1), np.zeros((prompts, slots))
    for p, row in enumerate(lengths):
        sample[p, : row.sum()], mask[p, : row.sum()] = np.repeat(np.arange(group), row), 1
    return rng.normal(size=(prompts, slots)), mask, sample, lengths


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "seq_sum"])
def test_aggregation_by_hand_and_micro_batches_add_up(aggregation):
    values, mask, sample, lengths = batch()
    exact = LossConfig(agg_eps=0.0)
    total, number = aggregate(jnp.array(values), jnp.array(mask), jnp.array(sample), 3, 10, aggregation)
    answers = [values[p, sample[p] == g] for p in range(6) for g in range(3) if lengths[p, g]]
    want, over = {
        "token_mean": (np.concatenate(answers).mean(), lengths.sum()),
        "seq_mean": (np.mean([a.mean() for a in answers]), len(answers)),
        "seq_sum": (np.mean([a.sum() / 10 for a in answers]), 10 * len(answers)),
    }[aggregation]
    np.testing.assert_allclose(finish(total, number, exact), want, atol=1e-14)
    assert number == count(jnp.array(mask), jnp.array(sample), 3, 10, aggregation) == over
    parts = [aggregate(*(jnp.array(x[i : i + 2]) for x in (values, mask, sample)), 3, 10, aggregation) for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(p[0] for p in parts), total, atol=1e-14)
    assert sum(p[1] for p in parts) == number


def test_nothing_counted_is_zero():
    zero = jnp.zeros((1, 5))
    for config in LOSS_PRESETS.values():
        pair = aggregate(zero + jnp.nan, zero, jnp.zeros((1, 5), int), 2, 5, config.aggregation)
        assert finish(*pair, config) == 0


def test_presets():
    assert PROGUARD == LossConfig(0.2, 0.2, 3.0, 0.01, 0.001, 0.01, "token_mean", 1e-8, "ddof1", 1e-6)
    grpo = LOSS_PRESETS["grpo"]
    assert (grpo.dual_clip, grpo.kl_in_reward, grpo.entropy_coef, grpo.agg_eps) == (0, 0, 0, 0)
    # Without dual clip the loss of a bad answer is not bounded.
    assert one_token(grpo, logp=2.0, advantage=-1.0)[0] > 7 > one_token(BARE, logp=2.0, advantage=-1.0)[0]
