"""Training checkpoints: a pytree of sharded arrays per step, through orbax. The mesh may change between save and restore."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


class Checkpoints:
    """The numbered checkpoints of one run, in a folder of their own.

    A checkpoint appears under its step's name only when it is complete, so a killed run leaves none half written. All
    processes call `save` and `restore`; each writes and reads its own shards.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        """`keep` newest checkpoints stay; the folder is made when it is missing."""
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False),
        )
        self.folder = Path(folder)

    def save(self, step: int, state: Any) -> None:
        """Writes `state`, any pytree of jax arrays, and returns when it is safe. A step that is there already is not written again."""
        if step not in self.steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of `step` (default the latest), placed as `abstract` says: jax.ShapeDtypeStruct with shardings, or arrays.

        Types are cast to those of `abstract`. Raises ValueError when there is no such checkpoint, or its tree or shapes differ.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            raise ValueError(f"checkpoint {'' if step is None else step} not found in {self.folder}; there are: {self.steps() or 'none'}")
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint {self.folder / str(step)} does not fit this recipe: {reason}") from error

    def rewind(self, step: int = -1) -> None:
        """Deletes checkpoints after `step`; a run that starts afresh in an old folder deletes all of them."""
        for later in (found for found in self.steps() if found > step):
            self._manager.delete(later)

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        self._manager.close()
