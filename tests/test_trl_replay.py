"""Four steps of another trainer, replayed: the same weights, rows and advantages must give the same gradient norms (PAPERS C).

The stored run is TRL's GRPOTrainer on a tiny Qwen2.5-VL, one picture a row. Here every row is a group of one.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen import QUICK

from pgjax.config import LossConfig, MeshConfig, OptimizerConfig
from pgjax.data.positions import mrope_positions
from pgjax.data.schema import PromptBatch
from pgjax.generate.law import Law
from pgjax.generate.score import Packed, pack, score
from pgjax.grpo import losses
from pgjax.models.hf_config import config_from_hf
from pgjax.parallel.mesh import make_mesh
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer, update

GRADIENT_NORMS = (0.729985, 0.780122, 0.683331, 0.631610)
LOSS = LossConfig(dual_clip=0.0, kl_coef=0.01, kl_in_reward=0.0, entropy_coef=0.0, aggregation="seq_mean", agg_eps=0.0)
ADAM = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, grad_clip=1.0)
IMAGE_TOKEN, PAD_TOKEN = 262, 256
FOLDER = Path(os.environ.get("PGJAX_DATA", "")) / "trl_replay"

pytestmark = pytest.mark.skipif(
    "PGJAX_DATA" not in os.environ or not FOLDER.is_dir(), reason="needs the stored run: set PGJAX_DATA to a folder that holds trl_replay"
)


def prompts(dump) -> PromptBatch:
    """Left-padded rows -> right-padded; one picture of 4 x 4 patches in the processor's order, which is one window."""
    mask, ids = dump["prompt_mask"].astype(bool), dump["prompt_ids"]
    P, T = ids.shape
    tokens, position, delta = np.zeros((P, T), np.int32), np.zeros((P, T, 3), np.int32), np.zeros(P, np.int32)
    visual = np.full((P, T), -1, np.int32)
    for p in range(P):
        row = ids[p][mask[p]]
        tokens[p, : len(row)] = row
        position[p, : len(row)], delta[p] = mrope_positions(row == IMAGE_TOKEN, [(2, 2)])
        visual[p, np.flatnonzero(row == IMAGE_TOKEN)] = np.arange(4)
    assert (dump["image_grid_thw"] == [1, 4, 4]).all()
    yx = np.array([[2 * a + c, 2 * b + d] for a in range(2) for b in range(2) for c in range(2) for d in range(2)], np.int32)
    return PromptBatch(
        tokens_PT=tokens,
        length_P=mask.sum(1).astype(np.int32),
        position_PTX=position,
        delta_P=delta,
        visual_PT=visual,
        patches_PIB=dump["pixel_values"].reshape(P, 16, -1),
        patch_yx_PI2=np.tile(yx, (P, 1, 1)),
        grid_PI2=np.full((P, 16, 2), 4, np.int32),
        image_PI=np.zeros((P, 16), np.int32),
        id_P=np.arange(P, dtype=np.uint32),
    )


def answers(dump) -> Packed:
    tokens = dump["completion_ids"][:, None].astype(np.int32)
    length = dump["completion_mask"].sum(1)[:, None].astype(np.int32)
    return pack(jnp.asarray(tokens), jnp.zeros_like(tokens), jnp.asarray(length), tokens.shape[-1])


def pad_row_frozen(params):
    """PyTorch's embedding never trains the row of the pad token, which these answers also hold as an ordinary token."""
    table = params["model"]["embed_tokens"]["embedding"]
    frozen = table.at[PAD_TOKEN].set(jax.lax.stop_gradient(table[PAD_TOKEN]))
    return params | {"model": params["model"] | {"embed_tokens": {"embedding": frozen}}}


def test_gradient_norms():
    config = dataclasses.replace(config_from_hf(FOLDER / "tiny"), compute_dtype="float32", remat="none")
    setup = make_setup(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    optimizer = make_optimizer(ADAM, 4)
    state = setup.state(setup.load(FOLDER / "tiny"), optimizer)
    law = Law(jnp.zeros(config.text.vocab, bool), None, None, 32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def logprobs(params, batch, packed):
        return score(setup.model, params, batch, packed, law)[0]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(state, batch, packed, old_PQ, ref_PQ, advantage_PG):
        def loss_sum(params, micro):
            logp, entropy = score(setup.model, pad_row_frozen(params), *micro, law)
            mask_PQ, sample_PQ = packed.mask_PQ, packed.sample_PQ
            advantage_PQ = losses.per_token(advantage_PG, sample_PQ)
            token, metrics = losses.token_loss(logp, old_PQ, old_PQ, ref_PQ, entropy, advantage_PQ, mask_PQ, LOSS)
            total, _ = losses.aggregate(token, mask_PQ, sample_PQ, 1, 32, LOSS.aggregation)
            return total, losses.metric_pairs(metrics, mask_PQ, sample_PQ, 1, 32, LOSS.aggregation)

        number = losses.count(packed.mask_PQ, packed.sample_PQ, 1, 32, LOSS.aggregation)
        return update(state, optimizer, loss_sum, (batch, packed), number, 1)

    norms = []
    for number in range(4):
        with np.load(FOLDER / f"dump_{number}.npz") as file:
            dump = {key: file[key] for key in file.files}
        batch, packed = prompts(dump), answers(dump)
        old_PQ, ref_PQ = logprobs(state.params, batch, packed), dump["ref_per_token_logps"] * packed.mask_PQ
        if number == 0:  # the policy is still the reference
            np.testing.assert_allclose(old_PQ, ref_PQ, atol=1e-5)
        state, metrics = step(state, batch, packed, old_PQ, ref_PQ, dump["advantages"][:, None])
        norms.append(float(metrics["actor/grad_norm"]))
    assert norms == pytest.approx(GRADIENT_NORMS, rel=0, abs=1e-5)
