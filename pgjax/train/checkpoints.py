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
        """Writes `state`, any pytree of jax arrays, and returns when it is safe. A step that is there is left as it is."""
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, abstract: Any, step: int | None = None) -> Any:
        """The state of `step` (default the latest), placed as `abstract` says: jax.ShapeDtypeStruct with shardings, or arrays.

        Raises ValueError when there is no such checkpoint, or when its tree, shapes or types differ from `abstract`.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            raise ValueError(f"checkpoint {'' if step is None else step} not found in {self.folder}; there are: {self.steps() or 'none'}")
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {self.folder / str(step)} does not fit this recipe: {error}") from error

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        self._manager.close()
