"""How sure a guard is (DESIGN idea 2): what stands on a line of its answer against what could stand there.

The answer is cut where a line begins, continued with every alternative, and the engine scores all of them as tails of one prefix, whose
keys it still has. Labels: safe against unsafe. Categories: the ids that the prompt lists, on the Category line of an answer that calls
something unsafe; where the answer calls all safe, of one that would call the request unsafe. Not calibrated until `pgjax calibrate`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from pgjax.serving.engine import Tail

_ANSWER = re.compile(r"<answer>\r?\n(?=Request:)")
_LINES = re.compile(r"Request:(\w+)\r?\n(?:Response:(\w+)\r?\n)?(?=Category:)")


class Scores(NamedTuple):
    """Probability of unsafe on a line (None where the answer has no such line), and of each listed id given that something is unsafe;
    `outside` is what is left: a name, or an id that is not listed."""

    request: float | None
    response: float | None
    categories: dict[str, float]
    outside: float | None


def tails(text: str, opening: str, tokens: Sequence[int], tokenizer, ids: Sequence[str], has_response: bool) -> list[Tail]:
    """What to score behind an answer of these `tokens`, whose `text` begins with `opening` (part of the prompt). Of the lines that it
    lacks nothing is scored. Without `ids` no categories are."""
    found: list[Tail] = []

    def add(line: str, at: int, endings: dict[str, str]) -> None:
        branch = boundary(tokens, tokenizer, at - len(opening))
        between = text[len(opening) + len(_decode(tokenizer, tokens[:branch])) : at]
        texts = [between + ending for ending in endings.values()]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        found.extend(Tail(f"{line} {name}", branch, ids) for name, ids in zip(endings, encoded, strict=True))

    places = list(_ANSWER.finditer(text))  # the last counts: reasoning may spell an answer too
    if not places:
        return found
    start = places[-1].end()
    both = lambda line: {label: f"{line}:{label}" for label in ("safe", "unsafe")}  # noqa: E731
    add("request", start, both("Request"))
    if lines := _LINES.match(text, start):
        if lines[2]:
            add("response", lines.start(2) - len("Response:"), both("Response"))
        unsafe = "unsafe" in lines.groups()
        before = "" if unsafe else "Request:unsafe\n" + "Response:safe\n" * has_response
        if ids:
            add("category", lines.end() if unsafe else start, {name: f"{before}Category:{name}\n" for name in (*ids, "None")})
    return found


def boundary(tokens: Sequence[int], tokenizer, characters: int) -> int:
    """How many of an answer's tokens make at most so many characters."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_decode(tokenizer, tokens[:middle])) <= characters else (low, middle - 1)
    return low


def _decode(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def read(scored: Sequence[tuple[Tail, np.ndarray]]) -> Scores:
    """Scores from tails with their tokens' logprobs, float32."""
    lines: dict[str, dict[str, float]] = {}
    for line in ("request", "response", "category"):
        own = [(tail, logp) for tail, logp in scored if tail.name.startswith(line + " ")]
        if own:
            shared = _shared([tail.tokens for tail, _ in own])  # cancels; left out, it cannot cancel badly
            lines[line] = {tail.name.partition(" ")[2]: float(logp[shared:].astype(np.float64).sum()) for tail, logp in own}
    unsafe = lambda line: float(expit(lines[line]["unsafe"] - lines[line]["safe"])) if line in lines else None  # noqa: E731
    by_id = {name: float(np.exp(logp)) for name, logp in lines.get("category", {}).items()}
    known = max(1 - by_id.pop("None", 0.0), 1e-30)
    share = {name: min(p / known, 1.0) for name, p in by_id.items()}
    return Scores(unsafe("request"), unsafe("response"), share, max(1 - sum(share.values()), 0.0) if share else None)


def _shared(tokens: Sequence[Sequence[int]]) -> int:
    """How many first tokens all have."""
    return next((k for k, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1), min(map(len, tokens)))


def mean(scores: Sequence[Scores]) -> Scores:
    """The average over several thoughts; a line that one of the answers lacks counts where it is there."""
    average = lambda values: float(np.mean(known)) if (known := [v for v in values if v is not None]) else None  # noqa: E731
    names = list(dict.fromkeys(name for one in scores for name in one.categories))
    share = {name: average([one.categories.get(name) for one in scores]) for name in names}
    return Scores(average([s.request for s in scores]), average([s.response for s in scores]), share, average([s.outside for s in scores]))
