"""What a model was trained on, as content keys that lie beside it, so that an evaluation can tell what the model has seen.

data/training_rows.npy of a run folder or of a checkpoint directory: uint8 [keys, 16], sorted; of each row of training the key of all that
it shows and of its prompt alone. No text can be read from it.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pgjax.data.duplicates import asked_key, shown_keys
from pgjax.data.schema import Example
from pgjax.files import replace_file

TRAINING_ROWS = Path("data") / "training_rows.npy"


def write_training_rows(folder: Path, examples: Iterable[Example], checkpoint: str | None = None) -> None:
    """Writes the file below `folder`, unless it is there: the keys of `examples`, and those of the checkpoint that training starts from."""
    if (folder / TRAINING_ROWS).exists():
        return
    keys = set((checkpoint and read_training_rows(Path(checkpoint))) or ())
    for example in examples:
        keys |= shown_keys(example)
    data = io.BytesIO()
    np.save(data, np.frombuffer(b"".join(sorted(keys)), np.uint8).reshape(-1, 16))
    replace_file(folder / TRAINING_ROWS, data.getvalue())


def read_training_rows(model: Path) -> frozenset[bytes] | None:
    """The keys beside a model; None where nothing tells what it was trained on. ValueError for a file that is broken."""
    file = model / TRAINING_ROWS
    if not file.is_file():
        return None
    try:
        keys = np.load(file, allow_pickle=False)
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != 16:
            raise ValueError(f"it holds {keys.dtype} {list(keys.shape)}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} must hold content keys, uint8 [keys, 16] ({error}); copy the model's folder again") from None
    return frozenset(map(bytes, keys))


def overlap(examples: Iterable[Example], trained: frozenset[bytes]) -> int:
    """How many of these rows the model has seen: the prompt where that is labelled, else all of it."""
    return sum(asked_key(example) in trained for example in examples)
