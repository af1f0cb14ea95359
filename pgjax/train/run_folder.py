"""What a run leaves behind: config, metrics, TensorBoard events, samples (DESIGN section 7 names the files)."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from flax.traverse_util import flatten_dict

from pgjax.config import Recipe
from pgjax.files import read_json, remove_folder, replace_file
from pgjax.recipes import from_json, to_json, validate
from pgjax.train.trackers import open_tracker

# What a run may change when it goes on: where and in what portions it is computed, and what is kept of it.
MAY_CHANGE = (
    *("name", "devices", "mesh.", "data.root", "data.workers", "report.", "tracker"),
    *(f"{stage}.{key}" for stage in ("grpo", "sft") for key in ("micro_prompts", "checkpoint_every", "keep_")),
)
BUILT = ("data", "tokenizer")  # made from the recipe before the first checkpoint


class RunFolder:
    """`runs/NAME/` with config.json, metrics.jsonl, TensorBoard events, samples/STEP.jsonl and room for checkpoints/.

    With `write=False` (every process but the first) all methods do nothing. Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | Path, recipe: Recipe, write: bool = True, resume_step: int | None = None):
        """Opens or makes the folder and writes the resolved recipe.

        `resume_step` is the step of the checkpoint that the run goes on from; what was written after it is dropped, so that the
        steps done again appear once. None starts afresh: metrics, events and samples that lie there are dropped, and what was built
        for another recipe.
        """
        self.path = Path(path)
        self._write = write
        if not write:
            return
        from tensorboardX import SummaryWriter

        self.path.mkdir(parents=True, exist_ok=True)
        if resume_step is None and changed_keys(self.path, recipe, tuple(key for key in MAY_CHANGE if key != "data.root")):
            for name in BUILT:
                remove_folder(self.path / name)
        replace_file(self.path / "config.json", to_json(recipe))
        kept = self._rewind(resume_step)
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        self._events = SummaryWriter(str(self.path / "tensorboard"), flush_secs=10)
        config = flatten_dict(dataclasses.asdict(recipe), sep=".")
        self._tracker = None if recipe.tracker == "none" else open_tracker(recipe.tracker, recipe.name, config)
        for row in kept:
            self._add_events(row)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat], phase: str = "train") -> None:
        """Appends one line {"step", "phase", metrics...} and the same scalars as events; flushed at once. NaN is written as null."""
        if not self._write:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": step, "phase": phase} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        self._add_events(row)
        if self._tracker:
            self._tracker.log(step, {tag(phase, name): value for name, value in values.items() if math.isfinite(value)})

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
            if self._tracker:
                self._tracker.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewind(self, step: int | None) -> list[dict[str, Any]]:
        """Drops metrics and samples after `step` (None: all) and a last line that a killed run left unfinished; returns what stays.

        Events are dropped altogether, to be written anew from the metrics: a killed run lost some of them and has others twice.
        """
        kept = []
        if step is not None:
            # The supervised stage, whose steps have numbers of their own, lies before every checkpoint.
            kept = [row for row in read_metrics(self.path) if row["step"] <= step or row["phase"] == "warm_up"]
        replace_file(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        for file in (self.path / "samples").glob("*.jsonl*"):
            if step is None or int(file.name.partition(".")[0]) > step:
                file.unlink()
        for file in (self.path / "tensorboard").glob("events.out.*"):
            file.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)  # it says that the run has ended
        if step is None:
            (self.path / "calibration.json").unlink(missing_ok=True)  # of weights that are dropped
        return kept

    def _add_events(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "phase") and value is not None:
                self._events.add_scalar(tag(row["phase"], name), value, row["step"])


def tag(phase: str, name: str) -> str:
    """A metric's name in dashboards: as verl has it for training steps; the other phases are said before it."""
    return name if phase == "train" else f"{phase}/{name.removeprefix(phase + '/')}"


def changed_keys(path: Path, recipe: Recipe, may_change: tuple[str, ...] = MAY_CHANGE) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose value differs from the recipe that the run in this folder was started with, old and new value.

    Without those that begin with one of `may_change`; and `grpo.steps` and `sft.steps` may grow when no learning-rate schedule runs over
    them.
    """
    if not (path / "config.json").is_file():
        return {}
    old, new = (flatten_dict(dataclasses.asdict(x), sep=".") for x in (read_config(path), recipe))
    changed = {key: (old[key], new[key]) for key in new if old[key] != new[key] and not key.startswith(may_change)}
    for stage in ("grpo", "sft"):
        if new[f"{stage}.optimizer.schedule"] == "constant" and old[f"{stage}.steps"] < new[f"{stage}.steps"]:
            changed.pop(f"{stage}.steps")
    return changed


def check_same_run(path: Path, recipe: Recipe) -> None:
    """Before a run goes on: ValueError with the first key whose change would make it another run."""
    changed = changed_keys(path, recipe)
    for key, (old, new) in changed.items():
        others = f" (and {len(changed) - 1} more: {', '.join(list(changed)[1:])})" if len(changed) > 1 else ""
        raise ValueError(
            f"run {path} was started with {key} = {old!r}, now it is {new!r}{others}; "
            "go on as it was started, take another --name, or start over with --fresh"
        )


def ended(path: Path, steps: int, show: bool) -> dict[str, Any] | None:
    """The summary of a run that has ended, which it also says if `show`; None where there is none yet."""
    file = path / "summary.json"
    if not file.exists():
        return None
    if show:
        print(f"run {path} has ended after {steps} steps: nothing to do; --fresh starts it over", file=sys.stderr)
    return read_json(file)


def remove_run(path: Path) -> None:
    """Deletes a run folder; ValueError when something else lies there."""
    if not (path / "config.json").is_file() and any(file.is_file() for file in path.rglob("*")):
        raise ValueError(f"{path} is not a run folder (it has no config.json), so it is not deleted; choose another --name or --runs")
    remove_folder(path)


def read_config(path: str | Path) -> Recipe:
    """The recipe that the run in this folder was started with. ValueError where there is none, or only part of one."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a run folder: it has no config.json")
    try:
        return validate(from_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}; train the run again, or name another") from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order; an unfinished last line (of a killed run) is left out. No file, no lines."""
    file, rows = Path(path) / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
