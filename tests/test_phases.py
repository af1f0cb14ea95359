"""Times of phases, and what a step computes by the counts that MFU is defined by."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn
from tiny_recipe import tiny_recipe

from pgjax.config import LOSS_PRESETS
from pgjax.models.qwen_vl import QwenVL, init_boxed
from pgjax.models.released import RELEASED
from pgjax.train import phases as module
from pgjax.train.flops import PEAKS, matmul_weights, peak, phase_metrics, supervised_flops
from pgjax.train.phases import Phases

COUNTS = dict(patches=40, prompt=100, response=30, trained_patches=20, trained_prompt=50, trained_response=15)


def test_a_phase_lasts_from_the_end_of_the_one_before(monkeypatch):
    """Also where the next step is dispatched before this one has ended; waiting between steps belongs to none."""
    ends = iter([12.0, 15.0, 16.0, 31.0, 33.0])
    clock = iter([0.0, 10.0, 11.0, 30.0])
    monkeypatch.setattr(module, "_when_ready", lambda outputs: next(ends))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    phases, seconds = Phases(), []
    for names in (["decode", "score", "score"], ["decode"], ["decode"]):
        phases.begin()
        for name in names:
            phases.done(name, None)
        seconds.append(phases.split())
    assert seconds[0]() == {"decode": 2.0, "score": 4.0, "step": 6.0}
    assert seconds[1]() == {"decode": 15.0, "step": 15.0}  # dispatched at 11, begun when the first step ended, at 16
    assert seconds[2]() == {"decode": 2.0, "step": 2.0}


def test_matmul_weights_are_those_of_the_model():
    """Without the embedding; a tied head counts; a merger works on four patches at a time."""
    config = RELEASED["Qwen2.5-VL-7B"]
    found, text, vision = matmul_weights(config), config.text, config.vision
    attention = text.width * text.head_dim * (text.heads + 2 * text.kv_heads) + text.heads * text.head_dim * text.width
    assert found.decoder == text.layers * (attention + 3 * text.width * text.mlp)
    assert found.head == text.vocab * text.width
    block = 4 * vision.width**2 + 3 * vision.width * vision.mlp
    merger = (4 * vision.width) ** 2 + 4 * vision.width * text.width
    assert found.tower == vision.depth * block + 3 * 2 * 14**2 * vision.width + merger / 4
    tiny = tiny_recipe().model
    shapes = jax.eval_shape(lambda key: nn.meta.unbox(init_boxed(QwenVL(tiny), key)), jax.random.key(0))
    assert tiny.text.tied and matmul_weights(tiny).head == np.prod(shapes["model"]["embed_tokens"]["embedding"].shape)


@pytest.mark.parametrize(("change", "tower", "passes"), [({}, 1, 3), ({"freeze_vision": True}, 0, 3), ({"lora_rank": 2}, 0, 2)])
def test_flops_by_hand(change, tower, passes):
    recipe = tiny_recipe()
    assert recipe.grpo.scores_policy
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **change))
    weights = matmul_weights(recipe.model)
    seconds = dict.fromkeys(("encode", "prefill", "decode", "score", "reward", "update"), 0.5) | {"step": 3.0}
    got = phase_metrics(recipe, weights, seconds, COUNTS, 4, 1e9)
    forward = 2 * (weights.decoder * 65 + weights.head * 15 + tower * weights.tower * 20)
    expected = {
        "encode": 2 * weights.tower * 40,
        "prefill": 2 * weights.decoder * 100,
        "decode": 2 * (weights.decoder + weights.head) * 30,
        "score": 2 * forward,
        "reward": 0,
        "update": passes * forward,
    }
    for phase, flops in expected.items():
        assert got[f"perf/flops/{phase}"] == pytest.approx(flops) and got[f"timing_s/{phase}"] == 0.5
        assert got[f"perf/mfu/{phase}"] == pytest.approx(flops / (0.5 * 4 * 1e9))
    assert got["perf/tokens_per_s/decode"] == 60 and got["perf/time_per_step"] == 3.0
    assert not any("mfu" in name for name in phase_metrics(recipe, weights, seconds, COUNTS, 4, None))
    once = dataclasses.replace(recipe, grpo=dataclasses.replace(recipe.grpo, mini_prompts=recipe.grpo.prompts, loss=LOSS_PRESETS["grpo"]))
    assert phase_metrics(once, weights, seconds, COUNTS, 4, None)["perf/flops/score"] == forward  # by the reference alone


@pytest.mark.parametrize(("change", "tower", "passes"), [({}, 3, 3), ({"freeze_vision": True}, 1, 3), ({"lora_rank": 2}, 1, 2)])
def test_flops_of_a_supervised_step(change, tower, passes):
    config = dataclasses.replace(tiny_recipe().model, **change)
    weights = matmul_weights(config)
    expected = passes * 2 * (weights.decoder * 65 + weights.head * 15) + tower * 2 * weights.tower * 20
    assert supervised_flops(config, weights, 20, 50, 15) == pytest.approx(expected)


def test_peaks_go_by_the_longest_name_that_fits():
    device = type("Device", (), {})
    for kind, expected in (
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ):
        device.device_kind = kind
        assert peak(device) == expected
    assert peak(jax.devices()[0]) is None and all(value > 1e14 for value in PEAKS.values())
