"""The grouped layout beside the repeated one, in which every answer has a copy of its prompt: the same prompts, answers and model.

    python benchmarks/grouped.py [--model small|tiny] [--T 128 512 2048] [--G 4 16] [--R 64] [--prompts 1] [--repeats 3] [--json]

Both layouts are the same programs: the repeated one has groups of one, and every prompt G times. Prompts are T random tokens each.
Answers are sampled and end at lengths drawn from benchmarks/lengths.py's lognormal law (at most R, mean 0.29 R), the same in both.

* prefill + decode: the prompts' caches, then all answers through lanes of their own;
* update: `score` (logprobs and entropies) of the grouped layout's answers and its gradient by all parameters. All prompts stand in one
  row with all answers packed behind them, as a micro-batch does, so neither layout pads.

Rows have repeated / grouped of: tokens computed (prompts and answers), seconds (medians; of one run where it takes more than ten), and
memory (what XLA allots to the compiled program for temporaries and arguments, parameters among them).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from lengths import forced, quantiles, text_prompts
from timing import median_seconds, show
from vs_trl import QUESTIONS, SIZES, make_recipe

from pgjax import automaton as answers
from pgjax.data.schema import TEXT, PromptBatch
from pgjax.generate import law as laws
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.law import Law
from pgjax.generate.score import pack, score
from pgjax.models.qwen_vl import QwenVL, init_boxed
from pgjax.tokenizer import never_sampled, train_byte_bpe
from pgjax.train.materials import cache_dir

LONG = 10  # seconds; what takes longer is measured once


def compiled(f: Callable, *args) -> tuple[Callable, int]:
    """`f` of these arguments, compiled, and the bytes of its temporaries and arguments."""
    program = jax.jit(f).lower(*args).compile()
    memory = program.memory_analysis()
    return lambda: program(*args), memory.temp_size_in_bytes + memory.argument_size_in_bytes


def sampling(model: QwenVL, law: Law, group: int) -> Callable:
    """Prefill and decode, as a function of parameters and prompts."""

    def rollout(params, batch: PromptBatch):
        start = prefill(model, params, batch, encode(model, params, batch))
        modality_P = jnp.full(len(batch.length_P), TEXT)
        return decode(model, params, batch, modality_P, start, law, jax.random.key(0), jnp.int32(0), group=group)[0]

    return rollout


def gradient(model: QwenVL, law: Law, width: int) -> Callable:
    """Forward and backward through `score` with all prompts and answers in one row; also gives the packed logprobs."""

    def of_params(params, batch: PromptBatch, tokens_PGR, length_PG):
        packed = pack(tokens_PGR, jnp.zeros_like(tokens_PGR), length_PG, width, len(batch.length_P))

        def loss(params):
            logp_PQ, entropy_PQ = score(model, params, batch, packed, law)
            return (logp_PQ + entropy_PQ).sum() / width, logp_PQ

        return jax.grad(loss, has_aux=True)(params)

    return of_params


def same_keys(copies: int) -> Callable:
    """`answer_keys` for prompts that stand `copies` times: each copy's answer has the key of one of the group's."""
    keys = laws.answer_keys
    return lambda key, step, id_P, group: keys(key, step, id_P[::copies], copies * group).reshape(-1, group)


def gap(a, b) -> float:
    """Largest difference between trees of arrays, as part of the largest number in them."""
    pairs = list(zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True))
    return float(max(np.abs(x - y.reshape(x.shape)).max() for x, y in pairs) / max(np.abs(x).max() for x, _ in pairs))


def compare(model: QwenVL, law: Law, params, prompts: int, T: int, G: int, repeats: int) -> list[dict]:
    """The rows of one T and G."""
    one, R = text_prompts(model, prompts, T), law.limit
    measured: dict[str, list] = {"prefill + decode": [], "update": []}

    def measure_one(phase: str, f: Callable, *args):
        call, memory = compiled(f, *args)
        began = time.perf_counter()
        out = jax.block_until_ready(call())
        seconds = time.perf_counter() - began
        measured[phase].append((out, seconds if seconds > LONG else median_seconds(call, repeats, warm_up=0), memory))
        return out

    for copies, group in ((1, G), (G, 1)):
        batch = jax.tree.map(partial(np.repeat, repeats=copies, axis=0), one)
        with forced(quantiles("lognormal", R), np.asarray(law.automaton.stop_V)), mock.patch.object(laws, "answer_keys", same_keys(copies)):
            rollout = measure_one("prefill + decode", sampling(model, law, group), params, batch)
        if copies == 1:  # its answers serve both layouts
            tokens_PGR, length_PG = np.asarray(rollout.tokens_PGR), np.asarray(rollout.length_PG)
        answered = tokens_PGR.reshape(-1, group, R), length_PG.reshape(-1, group)
        measure_one("update", gradient(model, law, int(length_PG.sum())), params, batch, *answered)

    (a, *_), (b, *_) = measured["prefill + decode"]
    # Behind a draw that rounding has turned, answers are no longer the same.
    same = np.cumprod(np.asarray(a.tokens_PGR) == np.asarray(b.tokens_PGR).reshape(tokens_PGR.shape), axis=-1)
    gaps = {
        "lengths": gap(a.length_PG, b.length_PG),
        "tokens": 0.0 if same.mean() > 0.9 else 1.0,
        "sampled logprobs": gap(a.logp_PGR * same, b.logp_PGR.reshape(same.shape) * same),
        "gradients and logprobs": gap(*(out for out, *_ in measured["update"])),
    }
    if broken := {name: found for name, found in gaps.items() if found > 1e-3}:
        raise RuntimeError(f"T {T}, G {G}: the layouts do not compute the same: {broken}")

    response = int(length_PG.sum())
    token_ratio = (prompts * G * T + response) / (prompts * T + response)
    return [
        {"T": T, "G": G, "R": R, "phase": phase, "token_ratio": token_ratio, "time_ratio": repeated[1] / grouped[1],
         "memory_ratio": repeated[2] / grouped[2], "grouped_s": grouped[1], "repeated_s": repeated[1]}
        for phase, (grouped, repeated) in measured.items()
    ]  # fmt: skip


def measure(size: str, lengths: list[int], groups: list[int], limit: int, prompts: int, repeats: int) -> list[dict]:
    """Rows {T, G, R, phase, token_ratio, time_ratio, memory_ratio, grouped_s, repeated_s}. RuntimeError where the layouts disagree."""
    model, tokenizer = QwenVL(make_recipe(size).model), train_byte_bpe(QUESTIONS, 512)
    automaton = answers.build(tokenizer, answers.id_grid(1, 1), vocab=512, cache_dir=cache_dir())
    law = Law(jnp.asarray(never_sampled(tokenizer, 512)), automaton, None, limit)
    params = jax.jit(lambda key: nn.meta.unbox(init_boxed(model, key)))(jax.random.key(0))
    return [row for T in lengths for G in groups for row in compare(model, law, params, prompts, T, G, repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="small", help="of benchmarks/vs_trl.py")
    parser.add_argument("--T", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--G", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--R", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="after a run that does not count")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    title = (
        f"The repeated layout over the grouped one ({args.model} model, float32, {args.prompts} prompt(s) of T tokens, G answers of at "
        f"most R tokens, lognormal): medians of {args.repeats}. Both give the same logprobs and gradients."
    )
    show(measure(args.model, args.T, args.G, args.R, args.prompts, args.repeats), args.json, title)


if __name__ == "__main__":
    main()
