"""Qwen2.5-VL against transformers (golden files, and live where torch is installed), and the layouts against each other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden.make_qwen import GOLDEN, ROWS, config, reference, write_checkpoint

from pgjax.config import MeshConfig
from pgjax.models.attention import Row
from pgjax.models.checkpoint import config_from_hf, load_params
from pgjax.models.qwen2_5_vl import Qwen25VL, init_boxed
from pgjax.models.text import AnswerCache, DecoderLayer, Lanes
from pgjax.models.vision import VisionBlock
from pgjax.parallel.mesh import TRAINING, make_mesh, param_shardings

INPUTS = ("patches_PIB", "yx_PI2", "image_PI", "tokens_PT", "visual_PT", "position_PTX", "length_P")


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}


def inputs(arrays) -> list[np.ndarray]:
    return [arrays[k] / np.float32(64) if k == "patches_PIB" else arrays[k] for k in INPUTS]


def build(arrays, path):
    """The model of a golden case and its parameters, through a checkpoint on disk."""
    write_checkpoint(path, json.loads(str(arrays["config"])), json.loads(str(arrays["shapes"])))
    model = Qwen25VL(dataclasses.replace(config_from_hf(path), compute_dtype="float32", remat=False))
    boxed = jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0))
    shardings = param_shardings(boxed, TRAINING, make_mesh(MeshConfig(), jax.devices()[:1]))
    return model, load_params(path, nn.meta.unbox(boxed), shardings)


def compare(arrays, path) -> None:
    """Hidden states of every block and the logits, wherever the batch holds something."""
    model, params = build(arrays, path)
    blocks = lambda module, method: isinstance(module, (VisionBlock, DecoderLayer)) and method == "__call__"  # noqa: E731
    run = jax.jit(lambda params, *args: model.apply({"params": params}, *args, capture_intermediates=blocks, mutable=["intermediates"]))
    logits, captured = run(params, *inputs(arrays))
    vision = captured["intermediates"]["visual"]["blocks"]["__call__"][0][0]
    text = captured["intermediates"]["model"]["layers"]["__call__"][0][0][0]
    filled, real = arrays["image_PI"] >= 0, np.arange(logits.shape[1]) < arrays["length_P"][:, None]
    assert vision.shape[0] == model.config.vision.depth and text.shape[0] == model.config.text.layers
    for ours, theirs in (
        (np.asarray(vision)[:, filled], arrays["vision_blocks"]),
        (np.asarray(text)[:, real], arrays["text_blocks"][:, real]),
        (np.asarray(logits)[real], arrays["logits"][real]),
    ):
        assert np.abs(theirs).max() > 0.5  # the comparison is about something
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_equals_transformers(case, tmp_path):
    compare(golden(case), tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_equals_transformers_live(seed, tmp_path):
    pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    kv_heads, window = int(rng.integers(1, 4)), int(rng.choice([56, 112]))
    raw = config(seed, tied=bool(seed % 2), heads=2 * kv_heads, kv_heads=kv_heads, window=window, full=tuple(rng.choice(3, 2, replace=False).tolist()))
    pictures = [tuple(rng.integers(1, 7, 2).tolist()) for _ in range(4)]
    rows = [[int(rng.integers(1, 9)), pictures[0], 3], [5], [1, pictures[1], 2, pictures[2], 4], [pictures[3], 2]]
    assert rows != ROWS
    compare(reference(raw, rows), tmp_path)


# --- layouts against each other: one model, prompts with pictures, answers packed, repeated and decoded -----------------------

P, G, R = 4, 3, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    arrays = golden("tied")
    model, params = build(arrays, tmp_path_factory.mktemp("tiny"))
    rng = np.random.default_rng(3)
    answers = {
        "tokens_PGR": rng.integers(0, 90, (P, G, R)).astype(np.int32),
        "length_PG": np.array([[4, 1, 3], [0, 4, 2], [4, 4, 4], [3, 0, 0]], np.int32),
        "weight_PGR": rng.normal(size=(P, G, R)).astype(np.float32),
    }
    return model, params, arrays, answers


def pack(answers, Q: int, block: int):
    """Answers of each group back to back: (sample, offset) [P, Q], -1 and 0 in empty slots."""
    sample, offset = np.full((P, Q), -1, np.int32), np.zeros((P, Q), np.int32)
    for p in range(P):
        at = 0
        for g, n in enumerate(answers["length_PG"][p]):
            sample[p, at : at + n], offset[p, at : at + n] = g, np.arange(n)
            at += n
    assert Q % block == 0 and answers["length_PG"].max() <= block
    return sample, offset


def forward(model, params, prompts, delta_P, tokens_PQ, sample_PQ, offset_PQ, block):
    """Hidden states [P, T + Q, D] of prompts with packed answers."""
    patches, yx, image, tokens_PT, visual, position, length = prompts
    apply = lambda *args, method: model.apply({"params": params}, *args, method=method)  # noqa: E731
    x = apply(tokens_PT, visual, apply(patches, yx, image, method="encode"), method="embed")
    x = jnp.concatenate([x, apply(tokens_PQ, method="embed")], axis=1)
    answer = jnp.broadcast_to((length + delta_P)[:, None, None] + offset_PQ[..., None], (*offset_PQ.shape, 3))
    return apply(x, jnp.concatenate([position, answer], axis=1), Row(length, sample_PQ, tokens_PT.shape[1], block), method="rows")


def answer_logp(model, params, hidden, before, tokens):
    """Log-probability of each token from the hidden state before it; hidden [P, S, D], before and tokens [P, Q]."""
    state = jnp.take_along_axis(hidden, before[..., None], axis=1)
    logits = model.apply({"params": params}, state, method="logits")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def test_packed_groups_equal_repeated_prompts(tiny):
    model, params, arrays, answers = tiny
    prompts, delta = inputs(arrays), arrays["delta_P"]
    T, block = prompts[3].shape[1], 4
    sample, offset = pack(answers, 12, block)
    used = sample >= 0
    row = np.arange(P)[:, None]

    def loss(params, prompts, delta, tokens, sample, offset, weight, block):
        hidden = forward(model, params, prompts, delta, tokens, sample, offset, block)
        slot = T + np.arange(tokens.shape[1])
        before = jnp.where(offset == 0, prompts[-1][:, None] - 1, slot - 1)
        logp = answer_logp(model, params, hidden, before, tokens)
        return jnp.sum(jnp.where(sample >= 0, logp * weight, 0.0)), (logp, hidden[:, T:])

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="block")
    take = lambda x: np.where(used, x[row, np.maximum(sample, 0), offset], 0)  # noqa: E731
    (_, (logp, hidden)), grads = run(params, prompts, delta, take(answers["tokens_PGR"]), sample, offset, take(answers["weight_PGR"]), block)

    repeated = [np.repeat(x, G, axis=0) for x in prompts]
    flat = {k: v.reshape(P * G, -1) for k, v in answers.items()}
    offset_1 = np.broadcast_to(np.arange(R), (P * G, R)).astype(np.int32)
    sample_1 = np.where(offset_1 < flat["length_PG"], 0, -1)
    (_, (logp_1, hidden_1)), grads_1 = run(
        params, repeated, np.repeat(delta, G), flat["tokens_PGR"], sample_1, offset_1, flat["weight_PGR"], R
    )
    at = (np.nonzero(used)[0] * G + sample[used], offset[used])
    np.testing.assert_allclose(logp[used], logp_1[at], atol=1e-5)
    np.testing.assert_allclose(hidden[used], hidden_1[at], atol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads_1))
    assert largest > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest), grads, grads_1)


def test_decoding_equals_the_row_pass(tiny):
    model, params, arrays, answers = tiny
    prompts, delta = inputs(arrays), arrays["delta_P"]
    T, length, tokens = prompts[3].shape[1], prompts[-1], answers["tokens_PGR"]
    c = model.config.text

    @jax.jit
    def decode(params, prompts, delta, tokens_PGR):
        patches, yx, image, tokens_PT, visual, position, length = prompts
        apply = lambda *args, method, **kw: model.apply({"params": params}, *args, method=method, **kw)  # noqa: E731
        x = apply(tokens_PT, visual, apply(patches, yx, image, method="encode"), method="embed")
        row = Row(length, jnp.zeros((P, 0), jnp.int32), T, 1)
        hidden, prompt = apply(x, position, row, method="rows", cache_out=True)
        empty = jnp.zeros((c.layers, P, G, R, c.kv_heads, c.head_dim))

        def step(cache, offset):
            position = jnp.broadcast_to((length + delta)[:, None, None] + offset, (P, G, 3))
            x = apply(jax.lax.dynamic_index_in_dim(tokens_PGR, offset, axis=2, keepdims=False), method="embed")
            hidden, cache = apply(x, position, Lanes(length, offset), prompt, cache, method="lanes")
            return cache, hidden

        _, hidden_RPGD = jax.lax.scan(step, AnswerCache(empty, empty), jnp.arange(R))
        return hidden, jnp.moveaxis(hidden_RPGD, 0, 2)

    prompt_hidden, hidden = decode(params, prompts, delta, tokens)
    sample = np.broadcast_to(np.repeat(np.arange(G), R), (P, G * R)).astype(np.int32)
    offset = np.broadcast_to(np.tile(np.arange(R), G), (P, G * R)).astype(np.int32)
    run = jax.jit(lambda params, *args: forward(model, params, *args, R))
    rows = run(params, prompts, delta, tokens.reshape(P, -1), sample, offset)
    np.testing.assert_allclose(hidden.reshape(P, G * R, -1), rows[:, T:], atol=1e-5)
    real = np.arange(T) < length[:, None]
    np.testing.assert_allclose(np.asarray(prompt_hidden)[real], np.asarray(rows[:, :T])[real], atol=1e-5)


def test_answers_continue_as_if_written_into_the_prompt(tiny):
    """Positions length + delta + offset are those of one longer prompt, picture and all."""
    model, params, arrays, answers = tiny
    prompts, delta = inputs(arrays), arrays["delta_P"]
    (T, length), n = (prompts[3].shape[1], prompts[-1]), 2  # the prompts are padded by at least two slots
    answer = answers["tokens_PGR"][:, 0, :n]
    longer = [np.array(x) for x in prompts]
    for p in range(P):
        at = slice(length[p], length[p] + n)
        longer[3][p, at], longer[4][p, at] = answer[p], -1
        longer[5][p, at] = (longer[5][p, : length[p]].max() + 1 + np.arange(n))[:, None]
    logits = jax.jit(lambda params, *args: model.apply({"params": params}, *args))(params, *longer[:-1], length + n)
    zeros = np.zeros((P, n), np.int32)
    offset = np.broadcast_to(np.arange(n), (P, n)).astype(np.int32)
    hidden = jax.jit(lambda params, *args: forward(model, params, *args, n))(params, prompts, delta, answer, zeros, offset)
    ours = model.apply({"params": params}, hidden[:, T:], method="logits")
    theirs = np.stack([logits[p, length[p] : length[p] + n] for p in range(P)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rematerialised_layers_give_the_same_gradients(tiny):
    model, params, arrays, _ = tiny
    again = Qwen25VL(dataclasses.replace(model.config, remat=True))
    real = np.arange(arrays["tokens_PT"].shape[1]) < arrays["length_P"][:, None]

    def loss(params, model, *args):
        logits = model.apply({"params": params}, *args)
        return jnp.sum(jnp.where(real[..., None], logits, 0.0) ** 2)

    grads, grads_again = (jax.jit(jax.grad(loss), static_argnums=1)(params, m, *inputs(arrays)) for m in (model, again))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max() + 1)), grads, grads_again)
