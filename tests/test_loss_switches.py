"""Switches of the loss beyond the published run's, each against its formula written out in plain Python and NumPy, in float64."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.config import LOSS_PRESETS, AnswerConfig, GRPOConfig, LossConfig, Recipe, RolloutConfig
from pgjax.grpo.advantages import advantages, informative, overlong_penalty, select
from pgjax.grpo.losses import aggregate, kl_estimate, metric_pairs, per_token, token_loss
from pgjax.recipes import validate

BARE = LossConfig(dual_clip=0.0, kl_coef=0.0, kl_in_reward=0.0, entropy_coef=0.0, agg_eps=0.0)
P, G, R, Q = 3, 3, 5, 16  # the last prompt has weight 0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def clip(x, low, high):
    return min(max(x, low), high)


def plain_kl(logp, ref, kind):
    difference = logp - ref
    return {"k1": difference, "k2": difference**2 / 2, "k3": clip(math.exp(-difference) - 1 + difference, -10, 10)}[kind]


def plain_advantages(rewards, loss):
    """One group, answer by answer."""
    if len(rewards) == 1:
        return [rewards[0] / (1 if loss.std == "off" else 1 + loss.std_eps)]
    own = []
    for i, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i or loss.baseline == "mean"]
        own.append(reward - sum(others) / len(others))
    ddof = {"ddof1": 1, "ddof0": 0, "off": 0}[loss.std]
    std = np.std(rewards, ddof=ddof)
    return own if loss.std == "off" else [a / (std + loss.std_eps) for a in own]


def plain_loss(logp, data, loss):
    """The whole loss of a batch: every answer and token in turn."""
    sums, tokens, answers = [], 0, 0
    for p, g, slots in data["answers"]:
        own = 0.0
        for q in slots:
            old, sampled, ref, entropy = (data[name][p, q] for name in ("old", "sampled", "ref", "entropy"))
            a, ratio = data["advantage"][p][g], math.exp(logp[p, q] - old)
            policy = max(-a * ratio, -a * clip(ratio, 1 - loss.clip_low, 1 + loss.clip_high))
            if loss.dual_clip and a < 0:
                policy = min(policy, -a * loss.dual_clip)
            if loss.tis_cap:
                policy *= min(math.exp(old - sampled), loss.tis_cap)
            own += policy - loss.entropy_coef * entropy + loss.kl_coef * plain_kl(logp[p, q], ref, loss.kl)
        sums.append(own / {"token_mean": 1, "seq_mean": len(slots), "seq_sum": R}[loss.aggregation])
        tokens, answers = tokens + len(slots), answers + 1
    return math.fsum(sums) / (tokens if loss.aggregation == "token_mean" else answers)


def batch(loss):
    """Packed rows of answers of 1 to R tokens, NaN in the slots left over, and what `plain_loss` reads of them."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, R + 1, size=(P, G))
    sample, mask = np.full((P, Q), -1), np.zeros((P, Q))
    for p, row in enumerate(lengths):
        sample[p, : row.sum()], mask[p, : row.sum()] = np.repeat(np.arange(G), row), p < P - 1
    noise = {"logp": 0.5, "old": 0.0, "sampled": 0.5, "ref": 0.6}
    start = rng.normal(size=(P, Q)) - 2
    data = {name: np.where(mask > 0, start + size * rng.normal(size=(P, Q)), np.nan) for name, size in noise.items()}
    data |= {"entropy": np.where(mask > 0, rng.random((P, Q)), np.nan), "mask": mask, "sample": sample}
    data["reward"] = rng.normal(size=(P, G))
    data["advantage"] = [plain_advantages(list(row), loss) for row in data["reward"]]
    data["answers"] = [(p, g, np.flatnonzero(sample[p] == g)) for p in range(P - 1) for g in range(G)]
    return data


def our_loss(logp, data, loss):
    """As the update computes it; also the metrics' means."""
    weight = jnp.array([1.0] * (P - 1) + [0.0])
    advantage_PG, _ = advantages(jnp.array(data["reward"]), jnp.zeros((P, G)), loss, weight)
    mask, sample = jnp.array(data["mask"]), jnp.array(data["sample"])
    others = [jnp.array(data[name]) for name in ("old", "sampled", "ref", "entropy")]
    tokens, metrics = token_loss(logp, *others, per_token(advantage_PG, sample), mask, loss)
    total, number = aggregate(tokens, mask, sample, G, R, loss.aggregation)
    pairs = metric_pairs(metrics, mask, sample, G, R, loss.aggregation)
    return total / number, {name: value / count for name, (value, count) in pairs.items()}


SWITCHES = {
    **{name: loss for name, loss in LOSS_PRESETS.items() if name != "proguard"},
    "k1": replace(BARE, kl="k1", kl_coef=0.3),
    "k2": replace(BARE, kl="k2", kl_coef=0.3),
    "k3": replace(BARE, kl="k3", kl_coef=0.3),
    "leave_one_out": replace(BARE, baseline="leave_one_out", std="off"),
    "tis": replace(BARE, tis_cap=1.25),
    "all": replace(BARE, dual_clip=1.2, kl="k2", kl_coef=0.1, entropy_coef=0.1, aggregation="seq_sum", tis_cap=1.1, clip_high=0.3),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_whole_loss_and_gradient(name):
    loss = SWITCHES[name]
    data = batch(loss)
    (value, metrics), grad = jax.value_and_grad(our_loss, has_aux=True)(jnp.array(data["logp"]), data, loss)
    np.testing.assert_allclose(value, plain_loss(data["logp"], data, loss), atol=1e-12, rtol=0)
    assert ("actor/tis_weight" in metrics) == (loss.tis_cap > 0)
    for p, q in np.ndindex(P, Q):
        if not data["mask"][p, q]:
            assert grad[p, q] == 0
            continue
        high, low = data["logp"].copy(), data["logp"].copy()
        high[p, q], low[p, q] = high[p, q] + 1e-6, low[p, q] - 1e-6
        slope = (plain_loss(high, data, loss) - plain_loss(low, data, loss)) / 2e-6
        np.testing.assert_allclose(grad[p, q], slope, atol=1e-8)


def test_the_switches_differ():
    """Else the comparison above would not notice one that does nothing."""
    plain, losses = {}, SWITCHES | {"bare": BARE}
    for name, loss in losses.items():
        data = batch(loss)
        plain[name] = plain_loss(data["logp"], data, loss)
    assert len({round(value, 6) for value in plain.values()}) == len(plain)


def test_estimators_by_hand():
    logp, ref = jnp.array([-0.5, -2.0]), jnp.array([-1.2, -0.75])  # 0.7 above and 1.25 below the reference
    want = {"k1": [0.7, -1.25], "k2": [0.245, 0.78125], "k3": [math.exp(-0.7) - 0.3, math.exp(1.25) - 2.25]}
    slope = {"k1": [1.0, 1.0], "k2": [0.7, -1.25], "k3": [1 - math.exp(-0.7), 1 - math.exp(1.25)]}
    for kind in want:
        np.testing.assert_allclose(kl_estimate(logp, ref, kind), want[kind], atol=1e-12)
        np.testing.assert_allclose(jax.grad(lambda x, kind=kind: kl_estimate(x, ref, kind).sum())(logp), slope[kind], atol=1e-12)


def test_what_the_estimators_gradients_are():
    """Summed over every token of a small vocabulary, under the policy: nothing, that of the reverse, and that of the forward KL."""
    z_V, ref_V = np.array([0.3, -0.4, 1.1, 0.0]), np.log([0.1, 0.4, 0.2, 0.3])
    log_softmax = lambda z_V: z_V - np.log(np.exp(z_V).sum())  # noqa: E731
    policy_V = np.exp(log_softmax(z_V))

    def reverse(z_V):
        return (np.exp(log_softmax(z_V)) * (log_softmax(z_V) - ref_V)).sum()

    def forward(z_V):
        return (np.exp(ref_V) * (ref_V - log_softmax(z_V))).sum()

    def slope(f):
        return [(f(z_V + step) - f(z_V - step)) / 2e-6 for step in 1e-6 * np.eye(4)]

    def expected(z_V, kind):  # tokens are drawn first: their probability has no gradient
        return (policy_V * kl_estimate(jax.nn.log_softmax(z_V), ref_V, kind)).sum()

    for kind, want in {"k1": np.zeros(4), "k2": slope(reverse), "k3": slope(forward)}.items():
        np.testing.assert_allclose(jax.grad(expected)(jnp.array(z_V), kind), want, atol=1e-8)
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(expected(jnp.array(z_V), kind), reverse(z_V), atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_reward(kind):
    old, ref = np.array([[-0.5, -1.0], [-0.3, -0.2], [-2.0, -0.1]]), np.array([[-0.7, -0.4], [-0.3, -1.2], [-1.5, -0.6]])
    reward, loss = [1.0, 0.5, 0.0], replace(BARE, kl_in_reward=0.2, kl_reward=kind, baseline="leave_one_out")
    kl = [sum(plain_kl(*pair, kind) for pair in zip(*rows, strict=True)) for rows in zip(old, ref, strict=True)]
    want = plain_advantages([r - 0.2 * k for r, k in zip(reward, kl, strict=True)], loss)
    kl_PG = kl_estimate(jnp.array(old), jnp.array(ref), loss.kl_reward).sum(axis=1)[None]
    np.testing.assert_allclose(advantages(jnp.array([reward]), kl_PG, loss)[0][0], want, atol=1e-12)


def test_leave_one_out():
    loss = replace(BARE, baseline="leave_one_out", std="off")
    got, _ = advantages(jnp.array([[4.0, 1.0, 1.0, 0.0]]), jnp.zeros((1, 4)), loss)
    np.testing.assert_allclose(got[0], [10 / 3, -2 / 3, -2 / 3, -2.0], atol=1e-12)
    for std in ("ddof1", "ddof0", "off"):
        loss = replace(BARE, baseline="leave_one_out", std=std)
        for rewards in ([3.0, 2.5, 2.0, 0.0], [1.0, 2.0], [2.5]):
            got, _ = advantages(jnp.array([rewards]), jnp.zeros((1, len(rewards))), loss)
            np.testing.assert_allclose(got[0], plain_advantages(rewards, loss), atol=1e-12)
    equal = jnp.full((1, 16), 2.7, jnp.float32)
    assert (advantages(equal, jnp.zeros_like(equal), loss)[0] == 0).all()


def test_truncated_importance_sampling():
    def one(sampled, cap, advantage=1.0):
        loss = replace(BARE, tis_cap=cap)
        f = lambda logp, old, sampled: token_loss(logp, old, sampled, 0.0, 0.0, jnp.array(advantage), jnp.ones(()), loss)  # noqa: E731
        grads = jax.grad(lambda *x: f(*x)[0], argnums=(0, 1, 2))(jnp.array(0.1), jnp.array(0.0), jnp.array(sampled))
        return grads, f(jnp.array(0.1), jnp.array(0.0), jnp.array(sampled))

    ratio = math.exp(0.1)
    for sampled, weight, capped in ((0.5, math.exp(-0.5), 0), (-0.3, math.exp(0.3), 0), (-1.0, 2.0, 1), (-50.0, 2.0, 1)):
        (grad, old_grad, sampled_grad), (value, metrics) = one(sampled, 2.0)
        np.testing.assert_allclose([value, grad], -weight * ratio, atol=1e-12)
        np.testing.assert_allclose(metrics["actor/tis_weight"], weight, atol=1e-12)
        assert metrics["actor/tis_capped"] == capped
        np.testing.assert_allclose(old_grad, weight * ratio, atol=1e-12)  # of the ratio alone
        assert sampled_grad == 0
    value, metrics = one(math.nan, 0.0)[1]  # off: not even read
    np.testing.assert_allclose(value, -ratio, atol=1e-12)
    assert not any("tis" in name for name in metrics)


def test_truncated_weights_leave_the_other_terms_alone():
    loss = replace(BARE, tis_cap=2.0, kl_coef=0.5, entropy_coef=0.1)
    value, _ = token_loss(*(jnp.array(x) for x in (-0.4, -0.4, 0.3, -1.0, 0.9, 0.0)), jnp.ones(()), loss)
    np.testing.assert_allclose(value, 0.5 * (math.exp(-0.6) - 0.4) - 0.09, atol=1e-12)


def test_metrics_of_truncated_weights():
    loss = SWITCHES["tis"]
    data = batch(loss)
    _, metrics = our_loss(jnp.array(data["logp"]), data, loss)
    weights = [math.exp(data["old"][p, q] - data["sampled"][p, q]) for p, _, slots in data["answers"] for q in slots]
    np.testing.assert_allclose(metrics["actor/tis_weight"], np.mean([min(w, 1.25) for w in weights]), atol=1e-12)
    np.testing.assert_allclose(metrics["actor/tis_capped"], np.mean([w > 1.25 for w in weights]), atol=1e-12)
    assert 0 < metrics["actor/tis_capped"] < 1


def test_overlong_penalty():
    got = overlong_penalty(jnp.array([[1, 12, 16, 17], [18, 19, 20, 21]]), limit=20, buffer=4)
    assert got.tolist() == [[0, 0, 0, -0.25], [-0.5, -0.75, -1, -1]]
    assert overlong_penalty(jnp.array([[0, 5, 10]]), limit=10, buffer=10).tolist() == [[0, -0.5, -1]]


def test_dynamic_sampling():
    reward = jnp.array([[1.0, 1, 1], [0, 1, 1], [2, 2, 2], [3, 0, 0], [np.nan, 1, 2], [0, 1, 0], [0, 0, 0], [0, 0, 5]])
    weight = jnp.array([1.0, 1, 1, 1, 0, 1, 1, 0])
    found_P = informative(reward, weight)
    assert found_P.tolist() == [False, True, False, True, False, True, False, False]
    choose = jax.jit(select, static_argnums=1)
    assert [x.tolist() for x in choose(found_P, 2)] == [[1, 3], [1, 1]]
    assert [x.tolist() for x in choose(found_P, 5)] == [[1, 3, 5, 0, 2], [1, 1, 1, 0, 0]]
    assert [x.tolist() for x in choose(jnp.zeros(4, bool), 2)] == [[0, 1], [0, 0]]
    assert sorted(choose(found_P, 8)[0].tolist()) == list(range(8))


@pytest.mark.parametrize(
    "loss, says",
    [
        (LossConfig(tis_cap=0.5), r"grpo.loss.tis_cap 0.5 must be 0 \(off\) or at least 1"),
        (LossConfig(overlong_buffer=-1), "grpo.loss.overlong_buffer -1 must be at least 0"),
        (LossConfig(overlong_buffer=65), "grpo.loss.overlong_buffer 65 must be at most answer.max_tokens 64"),
    ],
)
def test_what_does_not_fit_is_refused(loss, says):
    recipe = Recipe(answer=AnswerConfig(max_tokens=64), rollout=RolloutConfig(group=4), grpo=GRPOConfig(loss=loss))
    validate(replace(recipe, grpo=GRPOConfig(loss=LossConfig(tis_cap=1.0, overlong_buffer=64))))
    with pytest.raises(ValueError, match=says):
        validate(recipe)


def test_the_page_names_every_value_and_preset():
    page = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
    for field in fields(LossConfig):
        values = [value for value in get_args(field.type) if value]
        assert all(f"`{word}`" in page for word in (field.name, *values)), field.name
    assert all(f"`{name}`" in page for name in LOSS_PRESETS)


def test_presets():
    dapo, dr_grpo = LOSS_PRESETS["dapo"], LOSS_PRESETS["dr_grpo"]
    off = ("dual_clip", "kl_coef", "kl_in_reward", "entropy_coef", "agg_eps", "tis_cap")
    assert not any(getattr(loss, name) for loss in (dapo, dr_grpo) for name in off)
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation, dapo.std, dapo.overlong_buffer) == (0.2, 0.28, "token_mean", "ddof1", 204)
    assert (dr_grpo.clip_low, dr_grpo.clip_high, dr_grpo.aggregation, dr_grpo.std) == (0.2, 0.2, "seq_sum", "off")
