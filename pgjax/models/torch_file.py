"""The tensors of a `pytorch_model.bin`, read without torch, and without what makes unpickling a file dangerous.

Such a file is a zip archive: `NAME/data.pkl` is the pickled state dict, `NAME/data/KEY` the bytes of each storage, which the pickle
names by persistent ids. A pickle can call anything that it can import, so this one imports from a table of what a state dict needs.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

ADVICE = "convert it to safetensors, or copy the file again"


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """A view into a flat storage; offset and strides count elements. numpy refuses a view that leaves the storage."""
    size = storage.itemsize
    return np.ndarray(shape, storage.dtype, buffer=storage, offset=offset * size, strides=[step * size for step in stride])


# Storages are names here, not types: nothing of this table can be called but the two that are meant to be.
IMPORTS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "FloatStorage"): "float32",
    ("torch", "HalfStorage"): "float16",
    ("torch", "BFloat16Storage"): "bfloat16",
    ("torch", "LongStorage"): "int64",
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        super().__init__(archive.open(pickled))
        self.archive, self.folder = archive, pickled.removesuffix("data.pkl")
        self.storages: dict[str, np.ndarray] = {}  # tied tensors share one

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in IMPORTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which the weights of a model do not need")
        return IMPORTS[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid  # "storage", its type, its key, the device that it was on, its number of elements
        if key not in self.storages:
            self.storages[key] = np.frombuffer(self.archive.read(f"{self.folder}data/{key}"), jnp.dtype(dtype))
        return self.storages[key]


def load_torch_file(file: Path) -> dict[str, np.ndarray]:
    """Tensor name -> array (read-only; float32, float16, bfloat16 or int64) of a state dict that torch 1.6 or later saved.

    The archive's checksums are verified. ValueError for a file that is broken, of the older format, or asks for more than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "data.pkl")
            tensors = _Unpickler(archive, pickled).load()
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise ValueError(f"{file} cannot be read ({str(error) or type(error).__name__}); {ADVICE}") from error
    if not isinstance(tensors, dict) or not all(isinstance(key, str) and isinstance(x, np.ndarray) for key, x in tensors.items()):
        raise ValueError(f"{file} holds something else than tensors by name; {ADVICE}")
    return tensors
