"""Training checkpoints: a pytree of sharded arrays per step, through orbax. The mesh may change between save and restore."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pgjax.files import NO_ROOM, remove_folder, replace_file

SIZES = "sizes.json"  # in a checkpoint: the bytes of its files


def due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never), and at the end."""
    return step == last or (every > 0 and step % every == 0)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file() and file.name != SIZES
    }


def go_back(folder: Path, step: int) -> None:
    """Deletes the checkpoints after a step: a run goes on from its newest one. ValueError, and nothing is deleted, when that step has none
    or its is damaged."""
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []
    if step not in steps:
        raise ValueError(f"--from {step}: {folder} has no checkpoint of that step; there are: {steps or 'none'}")
    check_whole(folder, step, steps)
    for later in steps[steps.index(step) + 1 :]:
        remove_folder(folder / str(later))


def check_whole(folder: Path, step: int, steps: list[int]) -> None:
    """ValueError for a checkpoint, one of `steps`, whose files are not what was written; one without a list of them is left to orbax."""
    own = folder / str(step)
    if not (own / SIZES).exists():
        return
    now = _sizes(own)
    for name, size in json.loads((own / SIZES).read_text()).items():
        if now.get(name) != size:
            what = f"has {now[name]} bytes instead of {size}" if name in now else "is gone"
            earlier = [other for other in steps if other < step]
            way = f"`--from {earlier[-1]}` goes on from the one before" if earlier else "with none before it, `--fresh` starts over"
            raise ValueError(f"checkpoint {own} is damaged: its file {name} {what}; {way}")


class Checkpoints:
    """The numbered checkpoints of one run, in a folder of their own.

    A checkpoint appears under its step's name only when it is complete, so a killed run leaves none half written. All
    processes call `save` and `restore`; each writes and reads its own shards.
    """

    def __init__(self, folder: str | Path, keep: int | None = None):
        """For the run that writes: the `keep` newest stay, and the best; the folder is made, and what a killed run left is removed.

        Without `keep`, for reading beside it: nothing is made or removed.
        """
        self.folder, self._keep = Path(folder), keep
        options = ocp.CheckpointManagerOptions(
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
            enable_async_checkpointing=False,
            best_fn=lambda metrics: metrics["score"],  # without one, orbax writes no metrics
        )
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
        self._thin_out()

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Writes `state`, any pytree of jax arrays, and returns when it is safe. A step that is there already is not written again.

        `score`, the higher the better, makes it a candidate for the best. OSError when the disk is full: nothing is there then.
        """
        if step in self.steps():
            return
        for name in ("absl", "asyncio"):  # they log tracebacks of their own of what is raised here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics={"score": score}, force=True)
        except ValueError as error:
            for number in NO_ROOM:
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number), str(self.folder / str(step))) from error
            raise
        if jax.process_index() == 0:
            replace_file(self.folder / str(step) / SIZES, json.dumps(_sizes(self.folder / str(step))))
        self._thin_out()

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of `step` (default the latest), placed as `abstract` says: jax.ShapeDtypeStruct with shardings, or arrays.

        Types are cast to those of `abstract`. Raises ValueError when there is no such checkpoint, or its tree or shapes differ.
        """
        return self._restore(ocp.args.StandardRestore(abstract), step)

    def restore_part(self, abstract: dict, step: int | None = None) -> dict:
        """As `restore`, of what `abstract` names alone: nested dicts, a dataclass's fields by name. The rest is not read."""
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._restore(ocp.args.PyTreeRestore(item=abstract, restore_args=placed, partial_restore=True), step)

    def _restore(self, args: ocp.args.CheckpointArgs, step: int | None) -> Any:
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            raise ValueError(f"checkpoint {'' if step is None else step} not found in {self.folder}; there are: {self.steps() or 'none'}")
        check_whole(self.folder, step, self.steps())
        try:
            return self._manager.restore(step, args=args)
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint {self.folder / str(step)} does not fit this recipe: {reason}") from error

    def clear(self) -> None:
        """Deletes all of them, for a run that starts afresh."""
        self._delete(self.steps())

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest score, the newest of equals; None when none has a score."""
        scores = {step: (self._manager.metrics(step) or {}).get("score") for step in self.steps()}
        return max((step for step in scores if scores[step] is not None), key=lambda step: (scores[step], step), default=None)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _thin_out(self) -> None:
        """Not left to orbax, which does it after a save only: a deletion that was cut short would stay when nothing is saved any more."""
        if self._keep is not None:
            self._delete([step for step in self.steps()[: -self._keep] if step != self.best()])

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            self._manager.delete(step)
