"""The toy recipe shrunk until its programs compile in seconds, and what tests of the GRPO step share. Everything is made once."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
from tiny_qwen import QUICK

from pgjax.automaton import Automaton
from pgjax.config import (
    AnswerConfig,
    GRPOConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OODConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    WarmUpConfig,
)
from pgjax.data.schema import Gold, PromptBatch
from pgjax.generate.score import pack_values
from pgjax.grpo.programs import Experience, Judge, Programs
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.recipes import load_recipe, validate
from pgjax.train.materials import Materials, make_materials
from pgjax.train.setup import Setup, make_setup

Mesh = tuple[int, int, int]
ONE = (1, 1, 1)
MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
P, G, R = 8, 4, 32


def tiny_recipe() -> Recipe:
    toy = load_recipe("toy")
    text = dataclasses.replace(toy.model.text, vocab=1040, width=32, layers=2, kv_heads=2, head_dim=8, mlp=64, mrope_section=(2, 1, 1))
    vision = dataclasses.replace(toy.model.vision, width=32, mlp=64)
    recipe = dataclasses.replace(
        toy,
        name="tiny",
        model=dataclasses.replace(toy.model, text=text, vision=vision),
        tokenizer_vocab=1024,  # the head has 16 rows more
        data=dataclasses.replace(
            toy.data, prompt_tokens=152, train_examples=96, eval_examples=24, ood=OODConfig(share=0.3, keep=(1, 2), never_seen=("C5", "C6"))
        ),
        answer=AnswerConfig(max_tokens=R),
        rollout=RolloutConfig(group=G),
        warm_up=WarmUpConfig(steps=2, prompts=P, answers=2),
        grpo=GRPOConfig(
            steps=3,
            prompts=P,
            mini_prompts=4,
            micro_prompts=4,
            loss=LossConfig(agg_eps=0.0),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            validate_every=3,
            validate_prompts=16,
            checkpoint_every=2,
        ),
    )
    return validate(recipe)


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def materials() -> Materials:
    return make_materials(tiny_recipe(), folder())


def stopping(every: int = 12) -> Automaton:
    """The automaton with one token in so many a stop token: an untrained model then gives answers of many lengths."""
    automaton = materials().automaton
    return automaton.replace(stop_V=automaton.stop_V | (np.arange(len(automaton.stop_V)) % every == 0))


@functools.cache
def setup(mesh: Mesh = ONE, model: ModelConfig | None = None) -> Setup:
    devices = jax.devices()[: int(np.prod(mesh))]
    return make_setup(model or tiny_recipe().model, make_mesh(MeshConfig(*mesh), devices))


@functools.cache
def host_params() -> dict:
    """Parameters as numpy: embeddings that give a law of about 3.5 nats, and no bias zero, so that every token and position matters."""
    rng = np.random.default_rng(7)

    def louder(path: tuple, x: jax.Array) -> np.ndarray:
        noise = rng.normal(0, 1, x.shape).astype(np.float32)
        return 0.17 * noise if "embed_tokens" in jax.tree_util.keystr(path) else np.asarray(x) + 0.05 * noise

    return jax.tree_util.tree_map_with_path(louder, setup().init(0))


def params(mesh: Mesh = ONE) -> dict:
    """The same numbers on every mesh."""
    return jax.device_put(host_params(), setup(mesh).training)


def programs(mesh: Mesh, recipe: Recipe, optimizer: optax.GradientTransformation, automaton: Automaton | None = None) -> Programs:
    m = materials()
    with mock.patch.object(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK)):
        return Programs(recipe, setup(mesh, recipe.model), optimizer, automaton or m.automaton, m.tokenizer, Judge(m.embedder, m.bank))


def batch(rows: int = P) -> tuple[PromptBatch, Gold]:
    """A training batch as numpy, with pictures in some rows and none in others."""
    drawn = materials().train.batch(0, rows)
    assert len(set(drawn.gold.modality_P.tolist())) == 3
    return drawn.prompt, drawn.gold


def given_experience(run: Programs, policy, mesh: Mesh, prompts, gold, rollout, advantage_PG, noise_PGR, weight_P=None, visual=None):
    """An `Experience` of numpy numbers, by prompt, as a step arranges them: old logprobs by the scoring program, the reference's those
    with noise; also the old logprobs by prompt, [P, G, R]."""
    prompts, gold, rollout = place_rows((prompts, gold, rollout), run.mesh)
    choice, width = run.choose(rollout, None, gold)
    rows = run.arrange(rollout, prompts, gold, choice, visual, width=width)
    old_PQ = run.score(policy, rows)
    packed, shards = jax.tree.map(np.asarray, rows.packed), mesh[0] * mesh[1]
    lines, prompts_of_shard = len(packed.tokens_PQ), len(advantage_PG) // shards
    index_K = np.asarray(choice.index_K) + np.repeat(np.arange(shards) * prompts_of_shard, len(choice.index_K) // shards)
    weight_K = (np.ones(len(advantage_PG), np.float32) if weight_P is None else weight_P)[index_K]
    mask_PQ = packed.mask_PQ * np.take_along_axis(weight_K.reshape(lines, -1), packed.prompt_PQ, axis=1)
    ref_PQ = np.asarray(old_PQ + pack_values(noise_PGR[index_K], packed))
    given = place_rows((ref_PQ, advantage_PG[index_K].reshape(lines, -1), np.asarray(mask_PQ)), run.mesh)
    old_PGR = np.zeros(noise_PGR.shape, np.float32)
    row, slot = np.nonzero(packed.sample_PQ >= 0)
    prompt, sample = np.divmod(packed.sample_PQ[row, slot], packed.group)
    old_PGR[index_K.reshape(lines, -1)[row, prompt], sample, packed.offset_PQ[row, slot]] = np.asarray(old_PQ)[row, slot]
    return Experience(rows, old_PQ, old_PQ, *given), old_PGR
