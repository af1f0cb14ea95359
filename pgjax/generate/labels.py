"""How sure a guard is of a label: the probability of unsafe against safe on one line of its answer (DESIGN idea 2).

A label is not one token, and tokenizers part the two differently (`:s|afe`, `:|unsafe`), so nothing can be read off a single state.
The answer is cut before the label, closed once with safe and once with unsafe, and both are scored as two answers to one prompt.
Not calibrated: it orders inputs, but 0.9 is no promise of nine in ten.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from pgjax.data.schema import PromptBatch
from pgjax.generate.law import Law
from pgjax.generate.score import answer_rows, pack, score
from pgjax.models.qwen_vl import QwenVL
from pgjax.parallel.mesh import constrain, local_rows, place_rows

Line = Literal["Request", "Response"]
LINES: tuple[Line, ...] = ("Request", "Response")
Scorer = Callable[[dict, PromptBatch, np.ndarray, np.ndarray], np.ndarray]

_ANSWER = re.compile(r"<answer>\r?\n(?=Request:)")
_LINE = re.compile(r"(Request|Response|Category):[^\r\n]*(?:\r?\n|\Z)")


def line_starts(text: str) -> dict[str, int]:
    """Where the lines of an answer begin, by their names, as far as it has them in order; what follows need not be in format. The last
    place counts: reasoning may spell an answer too."""
    starts: dict[str, int] = {}
    places = list(_ANSWER.finditer(text))
    at = places[-1].end() if places else len(text)
    while (line := _LINE.match(text, at)) and line[1] not in starts:
        starts[line[1]], at = at, line.end()
    return starts


def label_prefixes(text: str, line: Line) -> tuple[str, str] | None:
    """An answer's text up to the label of that line, closed with safe and with unsafe; None where the answer has no such line."""
    if (start := line_starts(text).get(line)) is None:
        return None
    before = f"{text[:start]}{line}:"
    return before + "safe", before + "unsafe"


def answer_scorer(model: QwenVL, law: Law, mesh) -> Scorer:
    """The scoring program for given answers: (params, prompt, tokens_PGR, length_PG) -> logprobs, float32 numpy [P, G * R], packed.

    `prompt` is numpy, as `Pipeline.batch` gives it; each process passes its own rows and gets them back. Compiled once for each
    shape. `law` must not be constrained: given answers have no automaton states here.
    """
    if law.constrained:
        raise ValueError("answer_scorer: given answers are scored under an unconstrained law")

    @jax.jit
    def program(params, prompt: PromptBatch, tokens_PGR, length_PG):
        _, G, R = tokens_PGR.shape
        packed = pack(tokens_PGR, jnp.zeros_like(tokens_PGR), length_PG, G * R)
        return constrain(score(model, params, prompt, packed, law, entropy=False)[0], "batch", None)

    def scorer(params, prompt, tokens_PGR, length_PG):
        with jax.set_mesh(mesh):
            return local_rows(program(params, *place_rows((prompt, tokens_PGR, length_PG), mesh)))

    return scorer


def label_probabilities(
    scorer: Scorer, params: dict, prompt: PromptBatch, texts_P: Sequence[str], tokenizer, limit: int
) -> dict[Line, np.ndarray]:
    """Probability of unsafe on each line, float64 [P]: the softmax of both labels' logprobs after each answer's own words. `limit` is R.

    NaN where the answer has no such line, or has more than R tokens when its text is tokenized again (bytes that were no UTF-8). Both
    lines are scored behind one pass over the prompts.
    """
    encode = lambda pair: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair or ("", "")]  # noqa: E731
    pairs_PL = [[encode(label_prefixes(text, line)) for line in LINES] for text in texts_P]
    pairs_PL = [[pair if max(map(len, pair)) <= limit else [[], []] for pair in pair_L] for pair_L in pairs_PL]
    tokens_PGR, length_PG = answer_rows([[ids for pair in pair_L for ids in pair] for pair_L in pairs_PL], limit)
    logp_PQ = scorer(params, prompt, tokens_PGR, length_PG).astype(np.float64)
    ends_PG = length_PG.cumsum(axis=1)

    def unsafe(p: int, safe: int) -> float:
        """Of the pair of answers that begins with number `safe`."""
        (a, b), (end, last) = length_PG[p, safe : safe + 2], ends_PG[p, safe : safe + 2]
        if not a:
            return np.nan
        # What both share cancels; left out, it cannot cancel badly.
        shared = int(np.argmin(tokens_PGR[p, safe, : min(a, b)] == tokens_PGR[p, safe + 1, : min(a, b)]))
        return expit(logp_PQ[p, end + shared : last].sum() - logp_PQ[p, end - a + shared : end].sum())

    return {line: np.array([unsafe(p, 2 * n) for p in range(len(texts_P))]) for n, line in enumerate(LINES)}
