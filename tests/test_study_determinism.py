"""The determinism table: what a failed process of the trainer says, and what a row says of numbers known beforehand."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import tiny_encoder
from tiny_recipe import tiny_recipe

from pgjax.config import Recipe, WarmUpConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study_determinism as study  # noqa: E402

STEPS, P, G, R = 2, 8, 4, 8


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """Constrained answers parse, so that an untrained model has rewards to learn from; all else saves seconds."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_backend_optimization_level=0")
    tiny = tiny_recipe()
    grpo = replace(tiny.grpo, steps=STEPS, shares=4, validate_every=0, checkpoint_every=1, keep_checkpoints=3)
    reward = replace(tiny.reward, variant="published", embedder=str(tiny_encoder(tmp_path)))
    rollout = replace(tiny.rollout, constrained=True, packed_step=0.0)
    return replace(tiny, grpo=grpo, reward=reward, rollout=rollout, warm_up=WarmUpConfig())


def test_a_failed_process_is_an_error_with_what_it_said(recipe, tmp_path):
    wrong = replace(recipe, data=replace(recipe.data, prompts=str(tmp_path / "nowhere")))
    with pytest.raises(RuntimeError, match=r"1 device: exit \[1\][^$]*nowhere"):
        study.carry_out(study.BASE, wrong, tmp_path / "run", True)


def known(tokens_PGR: np.ndarray, logp: float, loss: float) -> study.Found:
    """Three steps that sample the same, with metrics of one number."""
    rollout = {"tokens_PGR": tokens_PGR, "length_PG": np.full((P, G), R), "logp_PGR": np.full((P, G, R), logp), "gap": np.array([logp])}
    metrics = {name: np.array([1.0, 1.0, loss]) for name in ("reward", "loss", "grad_norm")}
    return study.Found([{"step": 3, "loss": loss}], metrics, [dict(rollout) for _ in range(3)])


def test_a_row():
    tokens_PGR = np.zeros((P, G, R), int)
    other, same = replace(study.BASE, name="other"), replace(study.BASE, name="same")
    found = {study.BASE.name: known(tokens_PGR, -1.0, 2.0), "other": known(tokens_PGR, -1.5, 2.25), "same": known(tokens_PGR, -1.0, 2.0)}
    found["other"].rollouts[1] |= {"tokens_PGR": tokens_PGR + (np.arange(P) == 2)[:, None, None]}
    found["other"].rollouts[1] |= {"logp_PGR": np.full((P, G, R), -99.0)}  # of other tokens, so it says nothing
    row = study.row(other, found)
    assert (row["step_1_tokens_equal"], row["steps_tokens_equal"], row["steps"]) == (True, 1, 3)
    assert row["answers_equal"] == pytest.approx(1 - 1 / P / 3)
    assert (row["loss_difference"], row["logprob_difference"]) == (0.25, 0.5)
    assert not row["metrics_bitwise_equal"] and row["metrics_equal_to"] == []
    assert study.row(same, found)["metrics_equal_to"] == [study.BASE.name]
    found["other"].rollouts[:] = [found["other"].rollouts[1]] * 3
    row = study.row(other, found)
    assert (row["step_1_tokens_equal"], row["steps_tokens_equal"], row["logprob_difference"]) == (False, 0, None)
