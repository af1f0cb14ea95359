"""What a run leaves behind: config, metrics, TensorBoard events, samples (DESIGN section 7 names the files)."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from pgjax.config import Recipe
from pgjax.recipes import from_json, to_json


class RunFolder:
    """`runs/NAME/` with config.json, metrics.jsonl, TensorBoard events, samples/STEP.jsonl and room for checkpoints/.

    With `write=False` (every process but the first) all methods do nothing. Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path, recipe: Recipe, write: bool = True, resume_step: int | None = None):
        """Opens or makes the folder and writes the resolved recipe.

        `resume_step` is the step of the checkpoint that the run goes on from; what was written after it is dropped, so that the
        steps done again appear once. None starts afresh: metrics, events and samples that lie there are dropped.
        """
        self.path = Path(path)
        self._write = write
        if not write:
            return
        from tensorboardX import SummaryWriter

        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(self.path / "config.json", to_json(recipe))
        self._rewind(-1 if resume_step is None else resume_step)
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge, flush_secs=10)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], phase: str = "train") -> None:
        """Appends one line {"step", "phase", metrics...} and the same scalars as events; flushed at once. NaN is written as null."""
        if not self._write:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, "phase": phase, **line}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{phase}/{name}", value, step)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes samples/STEP.jsonl, one JSON object a row. What may be shown in a row is the caller's decision."""
        if self._write:
            (self.path / "samples").mkdir(exist_ok=True)
            replace_file(self.path / "samples" / f"{step}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes NAME (such as summary.json) into the folder."""
        if self._write:
            replace_file(self.path / name, json.dumps(data, indent=2) + "\n")

    def close(self) -> None:
        if self._write:
            self._metrics.close()
            self._events.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewind(self, step: int) -> None:
        """Drops metrics and samples after `step`, and a last line that a killed run left unfinished."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            replace_file(metrics, "".join(json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step))
        for file in (self.path / "samples").glob("*.jsonl"):
            if int(file.stem) > step:
                file.unlink()
        if step < 0:
            for file in (self.path / "tensorboard").glob("events.out.*"):
                file.unlink()


def read_config(path: str | Path) -> Recipe:
    """The recipe that the run in this folder was started with."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a run folder: it has no config.json")
    return from_json(file.read_text(encoding="utf-8"))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order; an unfinished last line (of a killed run) is left out."""
    rows = []
    for line in (Path(path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def replace_file(path: Path, text: str) -> None:
    """Writes aside and renames, so that a reader sees the old file or the new one, never half of it."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
