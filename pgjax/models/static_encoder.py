"""A second opinion on names: a static table of token vectors, their mean, normalised. Evaluation only, and only when it is installed.

A reward that is paid by one embedder's similarity is learnt by pleasing that embedder; another one, of another kind and never
trained against, tells whether the names became better. The package wordllama (MIT) carries a table of 32,000 x 256 and its tokenizer;
only those two files are read, nothing of the package is imported. It is weaker than the reward's encoder: compare runs by it, not models.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

PACKAGE = "wordllama"
TABLE, TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"


@dataclass(frozen=True)
class StaticEncoder:
    """The part of `Embedder` that a bank and evaluation need. Axes: V tokens, E embedding width, n texts."""

    table_VE: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def E(self) -> int:
        return self.table_VE.shape[1]

    def texts(self, texts: list[str]) -> np.ndarray:
        """Unit vectors float32 [n, E]; zero for a text without tokens."""
        vectors = np.zeros((len(texts), self.E), np.float32)
        for row, encoding in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            if encoding.ids:
                vectors[row] = self.table_VE[encoding.ids].mean(axis=0)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def load_static_encoder() -> StaticEncoder | None:
    """The table of the package wordllama, or None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    if not all((folder / name).is_file() for name in (TABLE, TOKENIZER)):
        raise ValueError(f"second embedder {folder}: no {TABLE} or {TOKENIZER}; install wordllama 0.4, or remove it to do without")
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    digest = hashlib.sha256((folder / TABLE).read_bytes() + (folder / TOKENIZER).read_bytes()).hexdigest()
    return StaticEncoder(load_file(folder / TABLE)["embedding.weight"].astype(np.float32), tokenizer, digest)
