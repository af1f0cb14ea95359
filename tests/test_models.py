"""Both families against transformers (golden files, and live where torch is installed), and the layouts against each other."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_qwen import CASES
from tiny_qwen import QUICK, build, golden, inputs

from pgjax.models import qwen2_5_vl, qwen3_vl
from pgjax.models.attention import Segments
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.text import AnswerCache, DecoderLayer, Lanes

jit = functools.partial(jax.jit, compiler_options=QUICK)


def compare(model, params, arrays) -> None:
    """Hidden states of every block and the logits, wherever the batch holds something."""
    kinds = (qwen2_5_vl.VisionBlock, qwen3_vl.VisionBlock, DecoderLayer)
    blocks = lambda module, method: isinstance(module, kinds) and method == "__call__"  # noqa: E731
    run = jit(lambda params, *args: model.apply({"params": params}, *args, capture_intermediates=blocks, mutable=["intermediates"]))
    logits, captured = run(params, *inputs(arrays))
    vision = captured["intermediates"]["visual"]["blocks"]["__call__"][0][0]
    vision = vision[0] if model.config.family == "qwen3_vl" else vision  # the other half carries DeepStack
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


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, tmp_path):
    arrays = golden(case)
    compare(*build(arrays, tmp_path), arrays)


def replaced(part: str, **values):
    """The model with other settings of `text` or `vision`."""

    def change(model, params, monkeypatch):
        settings = dataclasses.replace(getattr(model.config, part), **values)
        return QwenVL(dataclasses.replace(model.config, **{part: settings})), params

    return change


def zeroed(wanted: str):
    """Parameters whose path fits a pattern set to zero."""

    def change(model, params, monkeypatch):
        path_of = lambda path: "/".join(str(key.key) for key in path)  # noqa: E731
        zero = lambda path, x: x * 0 if re.fullmatch(wanted, path_of(path)) else x  # noqa: E731
        assert any(re.fullmatch(wanted, path_of(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        return model, jax.tree_util.tree_map_with_path(zero, params)

    return change


def other_gelu(model, params, monkeypatch, blocks: bool):
    """tanh for exact GELU in the mergers, or exact for tanh in the blocks."""
    gelu = jax.nn.gelu
    flipped = lambda x, approximate: gelu(x, approximate=not approximate if approximate == blocks else approximate)  # noqa: E731
    monkeypatch.setattr("flax.linen.gelu", flipped)
    return model, params


@pytest.mark.parametrize(
    "case, broken",
    [
        pytest.param("tied", replaced("vision", full_blocks=(0, 1, 2)), id="windows"),
        pytest.param("tied", replaced("vision", full_blocks=()), id="full blocks"),
        pytest.param("tied", replaced("text", mrope_section=(3, 3, 2)), id="M-RoPE sections"),
        pytest.param("tied", functools.partial(other_gelu, blocks=False), id="GELU of Qwen2.5's merger"),
        pytest.param("tied", zeroed(r"model/layers/self_attn/q_proj/bias"), id="q bias"),
        pytest.param("tied", zeroed(r"model/layers/self_attn/k_proj/bias"), id="k bias"),
        pytest.param("tied", zeroed(r"model/layers/self_attn/v_proj/bias"), id="v bias"),
        pytest.param("qwen3", replaced("text", mrope_interleaved=False), id="M-RoPE interleaved"),
        pytest.param("qwen3", replaced("text", qk_norm=False), id="q/k norm"),
        pytest.param("qwen3", replaced("vision", deepstack=(2, 0)), id="DeepStack order"),
        pytest.param("qwen3", replaced("vision", deepstack=(0, 1)), id="DeepStack blocks"),
        pytest.param("qwen3", functools.partial(other_gelu, blocks=False), id="GELU of Qwen3's mergers"),
        pytest.param("qwen3", functools.partial(other_gelu, blocks=True), id="GELU of Qwen3's blocks"),
        pytest.param("qwen3", zeroed("visual/pos_embed/embedding"), id="learned positions"),
    ],
)
def test_the_comparison_fails_when_a_part_is_broken(case, broken, tmp_path, monkeypatch):
    arrays = golden(case)
    model, params = broken(*build(arrays, tmp_path), monkeypatch)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(model, params, arrays)


# --- layouts against each other: one model, prompts with pictures, answers packed, repeated and decoded -----------------------

P, G, R = 4, 3, 4


@pytest.fixture(scope="module", params=["tied", "qwen3"])
def tiny(request, tmp_path_factory):
    """Model, parameters, visual tokens (computed once), prompts and answers."""
    arrays = golden(request.param)
    model, params = build(arrays, tmp_path_factory.mktemp("tiny"))
    *pictures, tokens, visual, position, length = inputs(arrays)
    encode = jit(lambda params: model.apply({"params": params}, *pictures, method="encode"))
    prompts = dict(tokens=tokens, visual=visual, position=position, length=length, delta=arrays["delta_P"])
    rng = np.random.default_rng(3)
    answers = {
        "tokens": rng.integers(0, 90, (P, G, R)).astype(np.int32),
        "length": np.array([[4, 1, 3], [0, 4, 2], [4, 4, 4], [3, 0, 0]], np.int32),
        "weight": rng.normal(size=(P, G, R)).astype(np.float32),
    }
    return model, params, jax.tree.map(np.asarray, encode(params)), prompts, answers


def pack(lengths, Q: int):
    """Answers of each group back to back: sample and offset [P, Q], -1 and 0 in empty slots."""
    sample, offset = np.full((P, Q), -1, np.int32), np.zeros((P, Q), np.int32)
    for p, group in enumerate(lengths):
        used = group.sum()
        sample[p, :used] = np.repeat(np.arange(len(group)), group)
        offset[p, :used] = np.concatenate([np.arange(n) for n in group])
    return sample, offset


def forward(model, params, visual, prompts, tokens_PQ, sample_PQ, offset_PQ):
    """Hidden states [P, T + Q, D] of prompts with packed answers."""
    apply = functools.partial(model.apply, {"params": params})
    x = apply(prompts["tokens"], prompts["visual"], visual, method="embed")
    x = jnp.concatenate([x, apply(tokens_PQ, method="embed")], axis=1)
    start = (prompts["length"] + prompts["delta"])[:, None, None]
    answer = jnp.broadcast_to(start + offset_PQ[..., None], (*offset_PQ.shape, 3))
    T = prompts["tokens"].shape[1]
    prompt, order = Segments.prompts(prompts["length"], T), jnp.where(sample_PQ >= 0, T + offset_PQ, 0)
    joined = (jnp.where(sample_PQ >= 0, 0, -1), sample_PQ, order)
    row = Segments(*(jnp.concatenate([x, y], axis=1) for x, y in zip((prompt.group, prompt.sample, prompt.order), joined, strict=True)))
    return apply(x, jnp.concatenate([prompts["position"], answer], axis=1), row, prompts["visual"], visual, method="rows")


def loss(weights, model, prompts, tokens, sample, offset, weight):
    """Weighted sum of the answers' logprobs; the first token's comes from the prompt's last hidden state."""
    params, visual = weights
    T = prompts["tokens"].shape[1]
    hidden = forward(model, params, visual, prompts, tokens, sample, offset)
    before = jnp.where(offset == 0, prompts["length"][:, None] - 1, T + jnp.arange(tokens.shape[1]) - 1)
    logits = model.apply({"params": params}, jnp.take_along_axis(hidden, before[..., None], axis=1), method="logits")
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(sample >= 0, logp * weight, 0.0)), (logp, hidden[:, T:])


def test_packed_groups_equal_repeated_prompts(tiny):
    """Per-token logprobs, hidden states, and the gradients of decoder and visual tokens; the repeated model rematerialises
    its layers and the packed one does not, so that this is compared as well."""
    model, params, visual, prompts, answers = tiny
    run = jit(jax.value_and_grad(loss, has_aux=True), static_argnames="model")
    sample, offset = pack(answers["length"], 12)
    used = sample >= 0
    place = lambda x: np.where(used, x[np.arange(P)[:, None], np.maximum(sample, 0), offset], 0)  # noqa: E731
    packed = place(answers["tokens"]), sample, offset, place(answers["weight"])
    (_, (logp, hidden)), (grads, visual_grad) = run((params, visual), model, prompts, *packed)

    repeat = lambda x: np.repeat(x, G, axis=0)  # noqa: E731
    flat = {k: v.reshape(P * G, -1) for k, v in answers.items()}
    offset_1 = np.broadcast_to(np.arange(R, dtype=np.int32), (P * G, R))
    sample_1 = np.where(offset_1 < flat["length"].reshape(-1, 1), 0, -1)
    again = QwenVL(dataclasses.replace(model.config, remat="full"))
    alone = flat["tokens"], sample_1, offset_1, flat["weight"]
    (_, (logp_1, hidden_1)), (grads_1, visual_grad_1) = run(
        (params, jax.tree.map(repeat, visual)), again, {k: repeat(v) for k, v in prompts.items()}, *alone
    )
    at = (np.nonzero(used)[0] * G + sample[used], offset[used])
    np.testing.assert_allclose(np.asarray(logp)[used], np.asarray(logp_1)[at], atol=1e-5)
    np.testing.assert_allclose(np.asarray(hidden)[used], np.asarray(hidden_1)[at], atol=1e-5)
    total = jax.tree.map(lambda g: np.asarray(g).reshape(P, G, *g.shape[1:]).sum(1), visual_grad_1)
    grads, grads_1 = (grads, visual_grad), (grads_1, total)
    assert all(np.abs(g).max() > 0.01 for g in jax.tree.leaves(total))
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads_1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest), grads, grads_1)


def test_decoding_equals_the_row_pass(tiny):
    model, params, visual, prompts, answers = tiny
    T, c = prompts["tokens"].shape[1], model.config.text

    @jit
    def decode(params, visual, prompts, tokens_PGR):
        apply = functools.partial(model.apply, {"params": params})
        x = apply(prompts["tokens"], prompts["visual"], visual, method="embed")
        row = Segments.prompts(prompts["length"], T)
        hidden, cache = apply(x, prompts["position"], row, prompts["visual"], visual, True, method="rows")
        empty = AnswerCache(*(jnp.zeros((c.layers, P, c.kv_heads, G, *last)) for last in ((c.head_dim, R), (R, c.head_dim))))

        def step(answer, offset):
            position = jnp.broadcast_to((prompts["length"] + prompts["delta"])[:, None, None] + offset, (P, G, 3))
            x = apply(jax.lax.dynamic_index_in_dim(tokens_PGR, offset, axis=2, keepdims=False), method="embed")
            sees_prompt = jnp.arange(T) < prompts["length"][:, None, None]
            lanes = Lanes(offset, sees_prompt, jnp.broadcast_to(jnp.arange(R) <= offset, (P, G, R)))
            hidden, answer = apply(x, position, lanes, cache, answer, method="lanes")
            return answer, hidden

        _, hidden_RPGD = jax.lax.scan(step, empty, jnp.arange(R))
        return hidden, jnp.moveaxis(hidden_RPGD, 0, 2)

    prompt_hidden, hidden = decode(params, visual, prompts, answers["tokens"])
    sample, offset = pack(np.full((P, G), R), G * R)
    rows = jit(lambda *args: forward(model, *args))(params, visual, prompts, answers["tokens"].reshape(P, -1), sample, offset)
    np.testing.assert_allclose(hidden.reshape(P, G * R, -1), rows[:, T:], atol=1e-5)
    real = np.arange(T) < prompts["length"][:, None]
    np.testing.assert_allclose(np.asarray(prompt_hidden)[real], np.asarray(rows[:, :T])[real], atol=1e-5)


def test_answers_continue_as_if_written_into_the_prompt(tiny):
    """Positions length + delta + offset are those of one longer prompt, picture and all."""
    model, params, visual, prompts, answers = tiny
    T, n = prompts["tokens"].shape[1], 2  # the prompts are padded by at least two slots
    answer, longer = answers["tokens"][:, 0, :n], {k: np.array(v) for k, v in prompts.items()}
    for p, length in enumerate(prompts["length"]):
        at = slice(length, length + n)
        longer["tokens"][p, at], longer["visual"][p, at] = answer[p], -1
        longer["position"][p, at] = (prompts["position"][p, :length].max() + 1 + np.arange(n))[:, None]
    longer["length"] += n
    sample, offset = pack(np.full((P, 1), n), n)
    run = jit(lambda *args: forward(model, *args))
    ours = run(params, visual, prompts, answer, sample, offset)[:, T:]
    theirs = np.asarray(run(params, visual, longer, answer, sample - 1, offset))  # no answers, one longer prompt
    theirs = np.stack([theirs[p, length : length + n] for p, length in enumerate(prompts["length"])])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("tiny", ["tied"], indirect=True)  # both families have this decoder
def test_what_is_kept_is_not_computed_anew(tiny):
    """The less a policy of rematerialisation keeps, the more operations a gradient takes."""
    model, params, visual, prompts, answers = tiny
    packed = answers["tokens"].reshape(P, -1), *pack(np.full((P, G), R), G * R), np.ones((P, G * R), np.float32)
    flops = {}
    for remat in ("none", "dots", "attention", "full"):
        net = QwenVL(dataclasses.replace(model.config, remat=remat))
        gradient = jax.jit(jax.grad(lambda weights: loss(weights, net, prompts, *packed)[0]))  # noqa: B023
        flops[remat] = gradient.lower((params, visual)).cost_analysis()["flops"]
    assert flops["none"] < flops["dots"] < flops["full"] and flops["none"] < flops["attention"] < flops["full"]
