"""What is scored behind an answer: forks with their tails (generate/continuous.py), cut into portions of one shape."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pgjax.generate.continuous import Tails

SLOTS = 128  # tokens of tails that are scored at a time


class Fork(NamedTuple):
    """Tails to score, of which one stands in the answer or could: behind `stem`, which takes the answer's place from token `branch` on. All
    tokens of a stem and of a tail together are at most SLOTS - 1. `name` and the tails' names are the asker's own."""

    name: str
    branch: int
    stem: list[int]
    tails: dict[str, list[int]]


def portions(forks: Sequence[Fork]) -> Iterator[list[Fork]]:
    """The same tails in lists of forks of at most SLOTS slots; a fork with many tails is cut into several with the same stem."""
    part: list[Fork] = []
    used = 0
    for fork in forks:
        head = 1 + len(fork.stem)
        open_fork: dict[str, list[int]] | None = None
        for name, tokens in fork.tails.items():
            if head + len(tokens) > SLOTS:
                raise ValueError(f"{fork.name} {name}: a stem of {head - 1} and a tail of {len(tokens)} tokens are more than {SLOTS - 1}")
            if used + len(tokens) + (0 if open_fork is not None else head) > SLOTS:
                yield part
                part, used, open_fork = [], 0, None
            if open_fork is None:
                open_fork = {}
                part.append(fork._replace(tails=open_fork))
                used += head
            open_fork[name] = tokens
            used += len(tokens)
    if part:
        yield part


class Pack:
    """Forks in slots: `tails` without the axis of shards, and `slots` of each tail by the names of fork and tail."""

    def __init__(self) -> None:
        zeros = lambda value=0: np.full(SLOTS, value, np.int32)  # noqa: E731
        self.tails = Tails(zeros(), zeros(), zeros(-1), zeros(-1), zeros(), zeros())
        self.slots: dict[tuple[str, str], np.ndarray] = {}  # of each tail
        self._next = self._tail = 0

    def put(self, forks: Sequence[Fork], tokens: Sequence[int], last: int) -> None:
        """Behind an answer of these `tokens`; `last` is the prompt's last one."""
        for number, fork in enumerate(forks):
            first = fork.branch - 1
            before = [tokens[first] if fork.branch else last, *fork.stem]
            stem = self._add(before, first, number, -1, first, self._next)
            for name, ids in fork.tails.items():
                self.slots[fork.name, name] = self._add(ids, fork.branch + len(fork.stem), number, self._tail, first, int(stem[-1]))
                self._tail += 1

    def _add(self, ids: Sequence[int], place: int, fork: int, tail: int, first: int, source: int) -> np.ndarray:
        slots = np.arange(self._next, self._next + len(ids))
        into = self.tails
        into.tokens_WQ[slots], into.place_WQ[slots] = ids, place + np.arange(len(ids))
        into.fork_WQ[slots], into.tail_WQ[slots], into.first_WQ[slots] = fork, tail, first
        into.source_WQ[slots] = np.append(source, slots[:-1])
        self._next += len(ids)
        return slots
