"""One tiny model against transformers in every respect: logits, gradients, greedy answers. Needs torch.

Used by tests/test_parity.py, and by benchmarks/parity.py for the table in docs/models.md.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden.make_qwen import IMAGE_TOKEN, batch, torch_inputs, torch_model, write_checkpoint
from tiny_qwen import QUICK, abstract_params, inputs, tiny_model

from pgjax.automaton import Automaton
from pgjax.data.schema import PromptBatch
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.law import Law
from pgjax.models.checkpoint import canonical, load_params, tensors
from pgjax.models.qwen_vl import QwenVL

# Text alone; one picture; two of different sizes; the smallest; the largest that the tests have, over several windows.
ROWS = [[11], [9, (3, 5), 4], [2, (2, 4), 3, (5, 1), 2], [1, (1, 1), 2], [(6, 6), 1]]
NEW = 32  # greedy tokens


def compare(raw: dict, rows=ROWS) -> dict[str, float]:
    """Largest differences from transformers in float32, greedy tokens that are equal of all, and the differences of bfloat16."""
    import torch

    theirs, written, shapes = torch_model(raw)
    made = batch(raw, rows)
    given = torch_inputs(made)
    real = np.arange(made["tokens_PT"].shape[1]) < made["length_P"][:, None]
    weight = np.where(real, np.random.default_rng(raw["seed"]).normal(size=real.shape), 0).astype(np.float32)
    position, delta = theirs.model.get_rope_index(**{n: x for n, x in given.items() if n != "pixel_values"})
    made |= {"position_PTX": position.permute(1, 2, 0).numpy().astype(np.int32), "delta_P": delta[:, 0].numpy().astype(np.int32)}

    logits = theirs(**given, position_ids=position).logits
    logp = torch.log_softmax(logits, -1).gather(-1, given["input_ids"][..., None])[..., 0]
    (logp * torch.tensor(weight)).sum().backward()
    grads = {canonical(name): p.grad.numpy() for name, p in theirs.named_parameters()}
    logits = logits.detach().numpy()
    left = left_padded(given, made["length_P"])
    blocked = list(range(IMAGE_TOKEN, logits.shape[-1]))
    with torch.no_grad():
        left_logits = theirs(**left).logits.numpy()
        new = theirs.generate(**left, max_new_tokens=NEW, do_sample=False, suppress_tokens=blocked, eos_token_id=None)[:, -NEW:].numpy()
        given["pixel_values"] = given["pixel_values"].bfloat16()
        half = theirs.to(torch.bfloat16)(**given, position_ids=position).logits.float().numpy()

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), written, shapes)
        model = tiny_model(Path(folder))
        params = load_params(folder, *abstract_params(model))

    def loss(params, *args):
        logits = model.apply({"params": params}, *args)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), args[4][..., None], axis=-1)[..., 0]
        return jnp.sum(logp * weight), logits

    args = inputs(made)
    our_grads, our_logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params, *args)
    our_half = QwenVL(dataclasses.replace(model.config, compute_dtype="bfloat16")).apply({"params": params}, *args)
    ours = {canonical(name): g for name, g in tensors(our_grads, model.config, np.float32)}
    tied = {"lm_head.weight"} if model.config.text.tied else set()
    assert ours.keys() == grads.keys() - tied
    largest = max(np.abs(g).max() for g in grads.values())
    from_left = np.concatenate([x[-n:] for x, n in zip(left_logits, made["length_P"], strict=True)])
    equal = int((greedy(model, params, made) == new).sum())
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "logits": np.abs(np.asarray(our_logits) - logits)[real].max(),
        "logits, left-padded": np.abs(np.asarray(our_logits)[real] - from_left).max(),
        "gradients": max(np.abs(ours[name] - grads[name]).max() for name in ours) / largest,
        "smallest gradient": min(np.abs(g).max() for g in ours.values()) / largest,  # each parameter has one
        "greedy": equal / new.size,
        "logits, bfloat16": np.abs(np.asarray(our_half) - logits)[real].max(),
        "theirs, bfloat16": np.abs(half - logits)[real].max(),
        "largest logit": np.abs(logits[real]).max(),
    }


def left_padded(given: dict, length_P: np.ndarray) -> dict:
    """The same prompts with their padding in front, as generation wants them."""
    import torch

    width = given["input_ids"].shape[1]
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    turned = {name: torch.stack([x.roll(width - int(n)) for x, n in zip(given[name], length_P, strict=True)]) for name in names}
    return given | turned


def greedy(model: QwenVL, params, made: dict) -> np.ndarray:
    """NEW tokens [P, NEW] by our own prefill and decode: the prompt's cache shared, the answer's grown."""
    P, V = len(made["length_P"]), model.config.text.vocab
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    # An automaton of one state that nothing leaves and nothing stops.
    endless = Automaton(
        zeros(V), zeros(1, 1).astype(jnp.int16), jnp.ones(1, bool), zeros(3), zeros(1) > 0, zeros(1), zeros(1), zeros(1), zeros(1),
        zeros(1, 1).astype(jnp.int16), zeros(1).astype(jnp.int16), zeros(V) > 0, (),
    )  # fmt: skip
    law = Law(jnp.arange(V) >= IMAGE_TOKEN, endless, jnp.ones((P, 1), bool), NEW)
    names = dict(patches_PIB="patches_PIB", patch_yx_PI2="yx_PI2", grid_PI2="grid_PI2", image_PI="image_PI")
    pictures = {ours: made[name] for ours, name in names.items()} | {"patches_PIB": made["patches_PIB"] / np.float32(64)}
    prompt = {name: made[name] for name in ("tokens_PT", "length_P", "position_PTX", "delta_P", "visual_PT")}
    prompts = PromptBatch(**prompt, **pictures, id_P=np.arange(P, dtype=np.uint32))

    def run(params, prompts):
        start = prefill(model, params, prompts, encode(model, params, prompts))
        rollout, _ = decode(model, params, prompts, zeros(P), start, law, jax.random.key(0), 0, group=1, greedy=True)
        return rollout.tokens_PGR[:, 0]

    return np.asarray(jax.jit(run, compiler_options=QUICK)(params, prompts))
