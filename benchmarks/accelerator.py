"""GRPO steps of real sizes on one accelerator: MFU, decoding beside its memory roofline, and transformers with torch on the same card.

    python benchmarks/accelerator.py [--models Qwen2.5-0.5B Qwen2.5-VL-3B Qwen2.5-VL-7B] [--T 1024] [--G 16] [--R 512] [--prompts 4]
                                     [--lora-rank 16] [--remat attention] [--repeats 3] [--out runs/accelerator.jsonl] [--json]

Needs jax, flax, optax, scipy, transformers, torch (for peers), and pgjax on PYTHONPATH; reads and fetches nothing else. Each side of
each model has a process of its own. A phase writes its line to --out when it is measured, and a later call on the same card does not
measure it again, so a call may be cut off; after a change of the code, take another file. A phase that fails (memory, mostly) has no
numbers and its reason as `note`, and is tried again.

Models have random weights and compute in bfloat16; 0.5B is Qwen2.5-0.5B's decoder beside the 3B's tower. A step has P prompts of T random
tokens, without pictures, in one micro-batch, and G answers to each that end at lengths drawn from benchmarks/lengths.py's lognormal law
(at most R, mean 0.29 R). The decoder is trained whole, with float32 AdamW, or (7B) by LoRA on a bfloat16 base: AdamW takes 16 bytes a
parameter, which for 7B is more than one card has. The tower is frozen.

* mfu is model FLOPs (train/flops.py; padding and recomputation do not count) by seconds and the card's dense bfloat16 peak.
* floor_s is benchmarks/floor.py's, at the matmul and copy rates reached here (see --out); ratio is seconds / floor_s. Decoding's
  is the memory roofline, or its matmuls where these take longer. "score" is policy and reference,
  "whole step" all programs of a step in their order, with random rewards.
* "attention, DTYPE" compares the platform's kernels, in the model's head sizes, with a plain softmax in float32: ratio is the largest
  difference of output and of the gradients of q, k and v, as part of the largest number, by what is allowed.
* memory_gb is the most that the process had on the card until then.

Peers (benchmarks/peers.py) have the decoder alone, SDPA attention, every prompt G times, answers sorted by length and padded to the
longest of their micro-batch, torch_rows of them: as many as fit. Their score is a pass over the answers' logits, counted twice; update
is forward and backward with gradient checkpointing, through all parameters or the same adapters, without an optimiser; decode is
`generate` from its first token on, until the longest answer's end. Each is measured once. Their whole step is the sum.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lengths import drawn, forced, quantiles, text_prompts
from roofline import PHASES, floors, rates
from timing import median_seconds, show

from pgjax import automaton as answers
from pgjax.config import AnswerConfig, GRPOConfig, MeshConfig, ModelConfig, Recipe, RolloutConfig, TextConfig, VisionConfig
from pgjax.data.schema import CATEGORY_NONE, SAFE, TEXT, Gold
from pgjax.generate.decode import Rollout
from pgjax.generate.lanes import Slots
from pgjax.generate.law import answer_keys
from pgjax.grpo.programs import Judge, Judged, Programs
from pgjax.models.attention import EMPTY, Segments, attention
from pgjax.models.flash import MASKED, seen
from pgjax.models.qwen_vl import QwenVL
from pgjax.models.released import RELEASED
from pgjax.models.sentence_encoder import Embedder
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.tokenizer import byte_tokenizer
from pgjax.train.flops import matmul_weights, peak, phase_metrics
from pgjax.train.setup import make_setup
from pgjax.train.trainable import merge
from pgjax.train.update import make_optimizer

_3B, _7B = RELEASED["Qwen2.5-VL-3B"], RELEASED["Qwen2.5-VL-7B"]
_HALF = TextConfig(151936, 896, 24, 14, 2, head_dim=64, mlp=4864, mrope_section=(8, 12, 12), tied=True)
_TINY = TextConfig(512, 64, 2, 4, 2, head_dim=16, mlp=128, mrope_section=(2, 3, 3))
MODELS = {  # shape; prompts P that one card of 80 GB holds; rank of adapters (0: the decoder is trained whole)
    "Qwen2.5-0.5B": (dataclasses.replace(_3B, text=_HALF), 16, 0),
    "Qwen2.5-VL-3B": (_3B, 4, 0),
    "Qwen2.5-VL-7B": (_7B, 8, 16),
    "tiny": (ModelConfig(text=_TINY, vision=VisionConfig(64, 2, 4, 128, full_blocks=(1,))), 2, 0),  # for CPUs
}
MEASURED = ("prefill", "decode", "score", "update", "whole step")
TARGETS = {"decode": "ratio <= 2", "score": "mfu >= 0.5", "update": "mfu >= 0.4", "whole step": "ratio <= 3"}
ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2}  # of attention's largest number; bfloat16 rounds its weights
COLUMNS = ("model", "trained", "P", "phase", "tokens", "seconds", "tokens_per_s", "mfu", "floor_s", "ratio", "target", "memory_gb")
BYTES = 256  # tokens of answers


class Sizes(NamedTuple):
    P: int
    T: int
    G: int
    R: int
    lora_rank: int
    remat: str


class Log:
    """Lines of a file, by phase: those that are there with the same keys, and those that are measured."""

    def __init__(self, path: Path, **keys):
        self.path, self.keys = path, keys
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
        self.found = {line["phase"]: line for line in lines if keys.items() <= line.items()}

    def has(self, *phases: str) -> bool:
        """Whether these have been measured; what failed has not."""
        return all("note" not in self.found.get(phase, {"note": ""}) for phase in phases)

    def measure(self, phase: str, f: Callable[..., dict], *args) -> None:
        """Write what `f` gives, or why it gives nothing, unless it is there."""
        if self.has(phase):
            return
        try:
            found = f(*args)
        except Exception as error:  # whatever it is, the other phases are worth their time
            found = {"note": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
        line = self.found[phase] = self.keys | {"phase": phase} | found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def answer_lengths(sizes: Sizes, id_P: np.ndarray) -> np.ndarray:
    """The lengths [P, G] of a step's answers in tokens, which are those that `forced` gives."""
    return np.asarray(drawn(quantiles("lognormal", sizes.R), answer_keys(jax.random.key(0), jnp.int32(0), id_P, sizes.G)))


def check_attention(text: TextConfig, dtype: str) -> dict:
    """{ratio, target} of attention over a row of two prompts with two answers each and an empty end."""
    parts = [(0, -1, 0, 180), (1, -1, 0, 140), (0, 0, 180, 50), (0, 1, 180, 70), (1, 2, 140, 30), (1, 3, 140, 40), (EMPTY, -1, 0, 2)]
    ids = np.concatenate([np.stack(np.broadcast_arrays(g, s, first + np.arange(n))) for g, s, first, n in parts], axis=1)
    segments, sees_SS = Segments(*jnp.asarray(ids[:, None], jnp.int32)), seen(ids[:, :, None], ids[:, None])
    keys, heads = jax.random.split(jax.random.key(0), 4), (text.heads, text.kv_heads, text.kv_heads, text.heads)
    args = [jax.random.normal(key, (1, ids.shape[1], n, text.head_dim), dtype) for key, n in zip(keys, heads, strict=True)]

    def plain(q, k, v):
        k, v = (jnp.repeat(x, text.heads // text.kv_heads, axis=2) for x in (k, v))
        score = jnp.where(sees_SS, jnp.einsum("bihc,bjhc->bhij", q, k) * text.head_dim**-0.5, MASKED)
        return jnp.einsum("bhij,bjhc->bihc", jnp.where(sees_SS, jax.nn.softmax(score), 0), v)

    def outputs(f, q, k, v, d_out):
        out, back = jax.vjp(f, q, k, v)
        return out, *back(d_out)

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):  # as programs call it
        found = jax.jit(partial(outputs, lambda q, k, v: attention(q, k, v, segments)))(*args)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(outputs, plain))(*(x.astype(jnp.float32) for x in args))
    gaps = [jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max() for a, b in zip(found, exact, strict=True)]
    return {"ratio": float(jnp.stack(gaps).max()) / ALLOWED[dtype], "target": "ratio <= 1"}  # NaN stays NaN in jnp's max


def ours(name: str, sizes: Sizes, repeats: int, path: Path) -> None:
    """Write the lines of pgjax's phases."""
    device, (P, T, G, R, rank, remat) = jax.devices()[0], sizes
    log = Log(path, side="ours", model=name, device=device.device_kind, **sizes._asdict())
    config = dataclasses.replace(MODELS[name][0], freeze_vision=True, lora_rank=rank, remat=remat)
    for dtype in ALLOWED:
        log.measure(f"attention, {dtype}", check_attention, config.text, dtype)
    if log.has(*MEASURED):
        return
    weights_of = matmul_weights(config)
    matmul, copy = rates(config.compute_dtype, 2 * (weights_of.decoder + weights_of.head))

    step, tokenizer = GRPOConfig(prompts=P, mini_prompts=P, micro_prompts=P), byte_tokenizer()
    recipe = Recipe(model=config, answer=AnswerConfig(max_tokens=R), rollout=RolloutConfig(group=G), grpo=step)
    setup, optimizer = make_setup(config, make_mesh(MeshConfig(), [device])), make_optimizer(step.optimizer, 1)
    automaton = answers.build(tokenizer, answers.id_grid(1, 1), vocab=config.text.vocab)
    programs = Programs(recipe, setup, optimizer, automaton, tokenizer, Judge(Embedder(None, {}, None, "none"), None))
    params = setup.init(0)
    reference = setup.reference(params)
    state = setup.state(params, optimizer)
    del params

    prompts, rng = text_prompts(setup.model, P, T), np.random.default_rng(1)
    length_PG, zeros_PGR = answer_lengths(sizes, prompts.id_P), np.zeros((P, G, R), np.int32)
    given = Rollout(rng.integers(0, BYTES, (P, G, R), np.int32), zeros_PGR.astype(np.float32), zeros_PGR, length_PG, zeros_PGR[..., 0])
    full, shown_PK = (lambda value: np.full(P, value, np.int32)), np.zeros((P, len(automaton.ids)), np.int32)
    labels = full(TEXT), full(SAFE), full(SAFE), full(CATEGORY_NONE), full(-1)
    gold = Gold(*labels, shown_PK, np.zeros((P, 1), bool), np.zeros(P, bool), np.ones(P, np.float32))
    batch, gold, given, reward_PG = place_rows((prompts, gold, given, rng.random((P, G), np.float32)), setup.mesh)

    # A step as grpo/trainer.py's grpo_step has it.

    def policy():
        return merge(state.params, reference)

    def started():
        weights = programs.gather(policy())
        visual = programs.encode(weights, batch)
        return weights, visual, programs.prefill(weights, batch, visual)

    def decoded(weights, start):
        return programs.decode(weights, batch, gold, start, jnp.int32(0), group=G, greedy=False)

    def scored(rollout, visual):
        choice, width = programs.choose(rollout, None, gold)
        rows = programs.arrange(rollout, batch, gold, choice, visual, width=width)
        return choice, rows, programs.score(policy(), rows), programs.score(reference, rows)

    def experience(rollout, visual, slots):
        judged = Judged(None, reward_PG, {}, None, None)
        return programs.experience(rollout, judged, batch, gold, *scored(rollout, visual), slots)[0]

    def updated(experience):
        nonlocal state
        state, metrics = programs.update(state, reference, experience, jnp.int32(0))
        return state, metrics

    # From each phase's inputs, which live as long as it is measured, to the call that is timed.

    def prefill():
        weights, visual, _ = started()
        return lambda: programs.prefill(weights, batch, visual)

    def decode():
        weights, _, start = started()
        if (np.asarray(decoded(weights, start)[0].length_PG) != length_PG).any():
            raise RuntimeError("decoding did not keep to the lengths that were drawn")
        return lambda: decoded(weights, start)

    def score():
        return partial(scored, given, started()[1])

    def update():
        return partial(updated, experience(given, started()[1], Slots.none()))

    def one_step():
        weights, visual, start = started()
        rollout, slots = decoded(weights, start)
        del weights, start
        return updated(experience(rollout, visual, slots))

    counts = {"patches": 0, "prompt": P * T, "response": int(length_PG.sum())}
    counts |= {f"trained_{what}": number for what, number in counts.items()}
    found = phase_metrics(recipe, weights_of, dict.fromkeys((*PHASES, "step"), 1.0), counts, 1, None)  # all of it a second
    flops, tokens = ({phase: found[f"perf/{what}/{phase}"] for phase in PHASES} for what in ("flops", "tokens_per_s"))
    floor = floors(recipe, prompts, length_PG, flops, matmul, copy)
    flops["whole step"], floor["whole step"], tokens["whole step"] = sum(flops.values()), sum(floor.values()), tokens["update"]

    def line(phase: str, prepare: Callable[[], Callable]) -> dict:
        seconds, best = median_seconds(prepare(), repeats), peak(device)
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "trained": f"LoRA {rank}" if rank else "decoder", "tokens": tokens[phase], "seconds": seconds,
            "tokens_per_s": tokens[phase] / seconds, "mfu": best and flops[phase] / seconds / best, "floor_s": floor[phase],
            "ratio": seconds / floor[phase], "target": TARGETS.get(phase), "memory_gb": memory and memory / 1e9,
            "matmul_rate": matmul, "copy_rate": copy,
        }  # fmt: skip

    with forced(quantiles("lognormal", R), np.asarray(automaton.stop_V)):
        for phase, prepare in zip(MEASURED, (prefill, decode, score, update, lambda: one_step), strict=True):
            log.measure(phase, line, phase, prepare)


def theirs(name: str, sizes: Sizes, path: Path) -> None:
    """Write the lines of the same phases in transformers and torch."""
    import peers

    log = Log(path, side="theirs", model=name, device=peers.device_name(), **sizes._asdict())
    if log.has(*MEASURED[:-1]):
        return
    config, (P, T, G, *_) = MODELS[name][0], sizes
    prompts = text_prompts(QwenVL(config), P, T)
    length_B = np.sort(answer_lengths(sizes, prompts.id_P).reshape(-1))[::-1]  # whose prompt an answer has makes no difference
    answer_BR = np.random.default_rng(1).integers(0, BYTES, (P * G, length_B[0]))
    tokens_BS = np.concatenate([np.repeat(prompts.tokens_PT, G, axis=0), answer_BR], axis=1)
    peer = peers.Peer(config.text, tokens_BS, length_B, T, sizes.lora_rank)

    def score() -> dict:
        found = peer.forward()
        return found | {"seconds": 2 * found["seconds"]}

    for phase, f in zip(MEASURED[:-1], (peer.prefill, peer.decode, score, peer.backward), strict=True):
        log.measure(phase, f)


def table(path: Path, models: dict[str, Sizes]) -> list[dict]:
    """Rows of what the file has for these models, peers' beside ours; None where nothing could be measured."""
    rows = []
    for name, sizes in models.items():
        device = jax.devices()[0].device_kind
        mine, other = (Log(path, side=side, model=name, device=device, **sizes._asdict()).found for side in ("ours", "theirs"))
        parts = [other.get(phase, {}).get("seconds") for phase in MEASURED[:-1]]
        other["whole step"] = {"seconds": None if None in parts else sum(parts)}
        for phase in (*(f"attention, {dtype}" for dtype in ALLOWED), *MEASURED):
            line, peer = {"model": name, "P": sizes.P, "phase": phase} | mine.get(phase, {}), other.get(phase, {})
            seconds, torch_s = line.get("seconds"), peer.get("seconds")
            row = {column: line.get(column) for column in COLUMNS}
            row |= {"torch_s": torch_s, "torch_rows": peer.get("torch_rows"), "torch_ratio": seconds and torch_s and torch_s / seconds}
            notes = [f"{side}: {found['note']}" for side, found in (("pgjax", line), ("torch", peer)) if "note" in found]
            rows.append(row | {"note": "; ".join(notes)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS)[:3])
    parser.add_argument("--prompts", type=int, help="P, in place of each model's own")
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--G", type=int, default=16)
    parser.add_argument("--R", type=int, default=512)
    parser.add_argument("--lora-rank", type=int, help="in place of each model's own; 0: all of the decoder is trained")
    parser.add_argument("--remat", default="attention", help="model.remat")
    parser.add_argument("--repeats", type=int, default=3, help="after a run that does not count")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator.jsonl"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # a side's own process
    args = parser.parse_args()
    models = {}
    for name in args.models:
        _, prompts, rank = MODELS[name]
        rank = rank if args.lora_rank is None else args.lora_rank
        models[name] = Sizes(args.prompts or prompts, args.T, args.G, args.R, rank, args.remat)
    if args.side:
        for name, sizes in models.items():
            ours(name, sizes, args.repeats, args.out) if args.side == "ours" else theirs(name, sizes, args.out)
        return
    # One process at a time has the card: pgjax takes nearly all of it at once; torch takes what it needs, and its JAX is on the CPU.
    environments = {"ours": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}, "theirs": {"JAX_PLATFORMS": "cpu"}}
    for name in models:
        for side, environment in environments.items():
            command = [sys.executable, *sys.argv, "--models", name, "--side", side]
            if code := subprocess.run(command, env=os.environ | environment, stdout=sys.stderr).returncode:
                print(f"{name}, {side}: ended with exit status {code}", file=sys.stderr)
    title = (
        f"A GRPO step on one device, bfloat16, random weights: P prompts of {args.T} tokens, {args.G} answers to each of at most {args.R} "
        f"tokens (lognormal), remat {args.remat}; medians of {args.repeats}. torch's update is forward and backward, without an optimiser."
    )
    show(table(args.out, models), args.json, title)


if __name__ == "__main__":
    main()
