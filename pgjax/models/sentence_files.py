"""What a sentence-transformers directory holds: config, pooling, tokenizer and tensors of a BERT or an XLM-RoBERTa, without torch.

`modules.json` lists the parts: the transformer, the pooling, and often a normalisation, which is the same to us with or without: our
vectors are compared by cosine, so that they always have length one. What else a directory holds is not read, such as the heads for
sparse and multi-vector retrieval of BGE-M3.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.normalizers import Lowercase

from pgjax.files import read_json
from pgjax.models.torch_file import load_torch_file

TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")  # the first that is there
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
POOLING: dict[str, Literal["mean", "cls"]] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}
# Left aside on purpose: the pooler and the heads of pretraining, whose outputs no sentence vector uses, and saved counters.
SURPLUS = re.compile(r"(pooler|cls|lm_head)\.|embeddings\.(position_ids|token_type_ids)$")

Encode = Callable[[list[str], int], list[list[int]]]  # texts, most tokens -> token ids, the special ones around each text


@dataclass(frozen=True)
class EncoderConfig:
    """The architecture and the pooling of an encoder; a capital letter is the axis that a number is the length of."""

    vocab: int
    width: int  # D
    layers: int
    heads: int  # H
    mlp: int
    positions: int
    types: int
    eps: float
    pad: int  # token id
    first_position: int  # XLM-RoBERTa counts positions from pad + 1, BERT from 0
    pooling: Literal["mean", "cls"]
    max_tokens: int  # longer inputs are cut: what the directory says, at most one token for each position


@dataclass(frozen=True)
class SentenceFiles:
    """The files that one encoder is read from, and their reading. Errors are ValueErrors that name the file."""

    config: Path
    pooling: Path
    tokenizer: Path
    weights: Path
    fingerprint: str  # of the content of all of them
    options: tuple[dict, dict]  # sentence_bert_config.json and tokenizer_config.json, empty where there is none

    def read_config(self) -> EncoderConfig:
        """ValueError also names a missing field, and a model, an activation or a pooling that is not supported."""
        raw, pooling = read_json(self.config), read_json(self.pooling)
        kind, activation = raw.get("model_type"), raw.get("hidden_act")
        if kind not in ("bert", "xlm-roberta"):
            raise ValueError(f"{self.config}: model_type {kind!r} is not supported; it must be bert or xlm-roberta")
        if activation != "gelu":
            raise ValueError(f"{self.config}: hidden_act {activation!r} is not supported; it must be gelu")
        # One key for each mode, or since version 6 of sentence-transformers one key for all.
        flags = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
        modes = pooling.get("pooling_mode", flags)
        mode = modes if isinstance(modes, str) else " and ".join(modes)
        if mode not in POOLING:
            raise ValueError(f"{self.pooling}: pooling {mode or 'of no kind'} is not supported; it must be mean or cls alone")
        sentence, tokenizer = self.options
        try:
            first = raw["pad_token_id"] + 1 if kind == "xlm-roberta" else 0
            limit = sentence.get("max_seq_length") or tokenizer.get("model_max_length") or np.inf
            config = EncoderConfig(
                vocab=raw["vocab_size"],
                width=raw["hidden_size"],
                layers=raw["num_hidden_layers"],
                heads=raw["num_attention_heads"],
                mlp=raw["intermediate_size"],
                positions=raw["max_position_embeddings"],
                types=raw["type_vocab_size"],
                eps=raw["layer_norm_eps"],
                pad=raw["pad_token_id"],
                first_position=first,
                pooling=POOLING[mode],
                max_tokens=int(min(limit, raw["max_position_embeddings"] - first)),
            )
        except KeyError as error:
            raise ValueError(f"{self.config}: no {error}; give a sentence-transformers directory as it was published") from error
        if config.width % config.heads:
            raise ValueError(f"{self.config}: hidden_size {config.width} must be a multiple of num_attention_heads {config.heads}")
        return config

    def read_tokenizer(self, vocab: int) -> Encode:
        """ValueError also when there are ids past the model's vocabulary: looking those up would give some row, silently."""
        try:
            size, encode = (_sentencepiece if self.tokenizer.suffix == ".model" else _hugging_face)(self.tokenizer, self.options[1])
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{self.tokenizer} cannot be read ({error}); copy the file again") from error
        if size > vocab:
            raise ValueError(f"{self.tokenizer}: {size} tokens, but config.json has vocab_size {vocab}; they belong to different models")
        lower = Lowercase().normalize_str
        return (lambda texts, limit: encode([lower(text) for text in texts], limit)) if self.options[0].get("do_lower_case") else encode

    def read_tensors(self) -> dict[str, np.ndarray]:
        """Tensors by their names without a prefix (`bert.`, `roberta.`), without the known surplus. ValueError for a broken file."""
        try:
            tensors = load_file(self.weights) if self.weights.suffix == ".safetensors" else load_torch_file(self.weights)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.weights} cannot be read ({error}); copy the file again") from error
        first = "embeddings.word_embeddings.weight"
        prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        return {name: value for name, value in tensors.items() if not SURPLUS.match(name)}


def find_files(directory: Path) -> SentenceFiles:
    """The files of a sentence-transformers directory. ValueError lists what is missing, or names a module that is not supported."""
    listing = directory / "modules.json"
    if not listing.is_file():
        raise ValueError(f"sentence encoder {directory}: no modules.json; give a sentence-transformers directory, with config.json and all")
    try:
        modules = json.loads(listing.read_text("utf-8"))
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        folders = [directory / module["path"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{listing} is not a list of modules with type and path; copy the file again") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{listing}: modules {', '.join(kinds)}; supported are Transformer, Pooling and, or without it, Normalize")
    transformer, pooling, *_ = folders
    choices = [[transformer / "config.json"], [pooling / "config.json"]]
    choices += [[transformer / name for name in names] for names in (TOKENIZERS, WEIGHTS)]
    found = [[file for file in files if file.is_file()][:1] for files in choices]
    missing = [" or ".join(str(x.relative_to(directory)) for x in files) for files, one in zip(choices, found, strict=True) if not one]
    if missing:
        raise ValueError(f"sentence encoder {directory}: no {', '.join(missing)}; give a sentence-transformers directory as published")
    files = [file for one in found for file in one]
    options = [transformer / name for name in ("sentence_bert_config.json", "tokenizer_config.json")]
    digest = hashlib.sha256()
    for file in [listing, *files, *options]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    sentence, tokenizer = (read_json(file) if file.is_file() else {} for file in options)
    config, mode, vocabulary, weights = files
    return SentenceFiles(config, mode, vocabulary, weights, digest.hexdigest(), (sentence, tokenizer))


def _hugging_face(file: Path, options: dict) -> tuple[int, Encode]:
    """Of tokenizer.json; or of BERT's vocab.txt, with the options of tokenizer_config.json."""
    if file.suffix == ".json":
        tokenizer = Tokenizer.from_file(str(file))
    else:
        lower, strip, chinese = (options.get(key) for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"))
        tokenizer = BertWordPieceTokenizer.from_file(
            str(file), lowercase=lower is not False, strip_accents=strip, handle_chinese_chars=chinese is not False
        )
    tokenizer.no_padding()  # files may ask for a fixed length

    def encode(texts: list[str], limit: int) -> list[list[int]]:
        tokenizer.enable_truncation(limit)
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    return tokenizer.get_vocab_size(), encode


def _sentencepiece(file: Path, options: dict) -> tuple[int, Encode]:
    """XLM-RoBERTa's ids: <s> 0, <pad> 1, </s> 2, <unk> 3, every other piece one later than the sentencepiece model counts it."""
    model = SentencePieceProcessor(model_file=str(file))
    if [model.id_to_piece(i) for i in range(3)] != ["<unk>", "<s>", "</s>"]:
        raise ValueError("its first pieces are not <unk>, <s> and </s>")

    def encode(texts: list[str], limit: int) -> list[list[int]]:
        return [[0, *(piece + 1 if piece else 3 for piece in pieces[: limit - 2]), 2] for pieces in model.encode(texts)]

    return model.get_piece_size() + 1, encode
