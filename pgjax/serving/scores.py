"""How sure a guard is (DESIGN idea 2): what stands on a line of its answer against what could stand there.

The answer is cut where a line begins and continued with every alternative; the engine scores all of them behind the keys that it still
has. Labels: safe against unsafe. Categories: the ids that the prompt lists, on the Category line of an answer that calls something
unsafe; where the answer calls all safe, of one that would call the request unsafe. Not calibrated until `pgjax calibrate`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit

from pgjax.generate.labels import line_starts
from pgjax.serving.forks import Fork

Decode = Callable[[Sequence[int]], str]
Encode = Callable[[list[str]], list[list[int]]]


class Scores(NamedTuple):
    """Probability of unsafe on a line (None where the answer has no such line), and of each listed id given that something is unsafe;
    `outside` is what is left: a name, or an id that is not listed."""

    request: float | None
    response: float | None
    categories: dict[str, float]
    outside: float | None


def forks(opening: str, tokens: Sequence[int], decode: Decode, encode: Encode, ids: Sequence[str], has_response: bool) -> list[Fork]:
    """What to score behind an answer of these `tokens`, whose text begins with `opening` (part of the prompt). Of the lines that it lacks
    nothing is scored. Without `ids` no categories are."""
    text = opening + decode(tokens)
    starts, found = line_starts(text), []

    def add(name: str, at: int, endings: dict[str, str]) -> None:
        branch = boundary(tokens, decode, at - len(opening))
        between = text[len(opening) + len(decode(tokens[:branch])) : at]
        encoded = encode([between + ending for ending in endings.values()])
        shared = next((k for k, column in enumerate(zip(*encoded, strict=False)) if len(set(column)) > 1), 0)
        tails = {ending: tail[shared:] for ending, tail in zip(endings, encoded, strict=True)}
        found.append(Fork(name, branch, encoded[0][:shared], tails))

    both = lambda line: {label: f"{line}:{label}" for label in ("safe", "unsafe")}  # noqa: E731
    for line in ("Request", "Response"):
        if line in starts:
            add(line, starts[line], both(line))
    if ids and "Category" in starts:
        unsafe = "unsafe" in text[starts["Request"] : starts["Category"]]
        before = "" if unsafe else "Request:unsafe\n" + "Response:safe\n" * has_response
        add("Category", starts["Category" if unsafe else "Request"], {name: f"{before}Category:{name}\n" for name in (*ids, "None")})
    return found


def boundary(tokens: Sequence[int], decode: Decode, characters: int) -> int:
    """How many of an answer's tokens make at most so many characters."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(decode(tokens[:middle])) <= characters else (low, middle - 1)
    return low


def read(logp: Mapping[str, Mapping[str, float]]) -> Scores:
    """Scores from the logprobs of the forks' tails."""
    unsafe = lambda line: float(expit(logp[line]["unsafe"] - logp[line]["safe"])) if line in logp else None  # noqa: E731
    by_id = {name: float(np.exp(value)) for name, value in logp.get("Category", {}).items()}
    known = max(1 - by_id.pop("None", 0.0), 1e-30)
    share = {name: min(p / known, 1.0) for name, p in by_id.items()}
    return Scores(unsafe("Request"), unsafe("Response"), share, max(1 - sum(share.values()), 0.0) if share else None)


def mean(scores: Sequence[Scores]) -> Scores:
    """The average over several thoughts; a line that one of the answers lacks counts where it is there."""
    average = lambda values: float(np.mean(known)) if (known := [v for v in values if v is not None]) else None  # noqa: E731
    names = list(dict.fromkeys(name for one in scores for name in one.categories))
    share = {name: average([one.categories.get(name) for one in scores]) for name in names}
    return Scores(average([s.request for s in scores]), average([s.response for s in scores]), share, average([s.outside for s in scores]))
