"""A live line for people at a terminal, a plain line every few seconds for everybody else."""

import sys
import time
from typing import Any, SupportsFloat, TextIO


class Progress:
    """Phase, step, numbers and time left of one loop; a context manager.

    `with Progress("train", 200) as p: p.update(step, reward=1.5)`, where `step` counts finished steps from 1; a `total` of 0 is not known.
    Steps done before a resumed run are given as `start`. With `show=False` (every process but the first) it prints nothing.
    """

    def __init__(self, phase: str, total: int, start: int = 0, show: bool = True, every: float = 5.0, out: TextIO | None = None):
        """`every` is the time between plain lines in seconds; `out` defaults to stderr."""
        self.phase, self.total, self.every = phase, total, every
        self._show, self._out = show, out or sys.stderr
        self._began = self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # first update: the step before it includes compilation
        self._step = start
        self._start = start
        self._live: Any = None

    def __enter__(self) -> "Progress":
        if self._show and self._out.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("[bold]{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._live = Bar(*columns, console=Console(file=self._out))
            self._live.start()
            self._task = self._live.add_task(self.phase, total=self.total or None, completed=self._start, note="starting, compiling")
        elif self._show:
            self._print("starting")
        return self

    def update(self, step: int, **numbers: SupportsFloat) -> None:
        """Says that `step` steps are done, with numbers to show beside it, such as reward=1.5."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        self._step = step
        if not self._show:
            return
        note = "  ".join([*(f"{name} {float(value):.4g}" for name, value in numbers.items()), self._time_left(now)])
        if self._live:
            self._live.update(self._task, completed=step, note=note)
        elif now - self._printed >= self.every or 0 < self.total <= step or self._first == (step, now):
            self._print(note)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self._show:
            ending = "done" if kind is None else f"stopped by {kind.__name__}"
            self._print(f"{ending} after {duration(time.monotonic() - self._began)}")

    def _time_left(self, now: float) -> str:
        if not self.total:
            return ""
        first_step, first_time = self._first or (self._step, now)
        if self._step <= first_step:
            return "time left unknown"
        return f"{duration((now - first_time) / (self._step - first_step) * max(self.total - self._step, 0))} left"

    def _print(self, note: str) -> None:
        self._printed = time.monotonic()
        print(f"{self.phase} {self._step}{f'/{self.total}' if self.total else ''}  {note}", file=self._out, flush=True)


def duration(seconds: float) -> str:
    """12 s, 3:07, 2:03:00."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if whole < 60:
        return f"{whole} s"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
