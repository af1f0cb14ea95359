"""How long each phase of a step takes, seen without holding the step up.

The host runs ahead of the devices: it has dispatched a step before the devices begin it. A thread of its own waits for what each phase
puts out, in order, and notes when it was there. A phase lasts from the end of the one before to its own.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax


class Phases:
    def __init__(self) -> None:
        self._waiter = ThreadPoolExecutor(1, "phases")
        self._marks: list[tuple[str, Future[float]]] = []
        self._began = self._end = time.monotonic()  # of the step being dispatched; of the phase that was last asked for

    def begin(self) -> None:
        """A step is about to be dispatched."""
        self._began = time.monotonic()

    def done(self, name: str, outputs) -> None:
        """A phase has been dispatched; `outputs` are arrays of it that nobody donates. A name may come more than once in a step."""
        self._marks.append((name, self._waiter.submit(_when_ready, outputs)))

    def split(self) -> Callable[[], dict[str, float]]:
        """The step has been dispatched. What it returns waits for it, and gives the seconds of each phase and of all as `step`; ask
        for one step after the other."""
        marks, began, self._marks = self._marks, self._began, []

        def seconds() -> dict[str, float]:
            self._end = start = max(self._end, began)  # it waited for the step before, or came after a pause
            found: dict[str, float] = {}
            for name, mark in marks:
                end = mark.result()
                found[name] = found.get(name, 0.0) + end - self._end
                self._end = end
            return found | {"step": self._end - start}

        return seconds


def _when_ready(outputs) -> float:
    jax.block_until_ready(outputs)
    return time.monotonic()
