"""What a tokenizer's tokens are as bytes, and a small byte-level BPE for generated data.

The text of an answer is `tokenizer.decode(ids before the first stop token, skip_special_tokens=True)`, as in the published reward
(PAPERS A8.7). Only tokens marked `special: true` are skipped: Qwen3's `<think>` is ordinary text.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

# Qwen2's pre-tokenizer (in its tokenizer.json): contractions, words, single digits, punctuation, line ends, spaces.
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# ChatML: every turn between <|im_start|>role and <|im_end|>; an image is one pad token between its markers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Seen often enough, the fixed parts of an answer become tokens of their own, as they are in a large vocabulary.
ANSWER_FORM = (
    "<think></think>\n<answer>\nRequest:safe\nRequest:unsafe\nResponse:safe\nResponse:unsafe\nCategory:None\nCategory:C1S1\n</answer>"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, every other byte for the next free character from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


def _decoders(tokenizer) -> list[dict]:
    """The steps of the fast tokenizer's decoder, each as its settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        raise ValueError(f"{type(tokenizer).__name__} has no fast decoder; load the tokenizer with AutoTokenizer (its tokenizer.json)")
    settings = json.loads(backend.decoder.__getstate__())
    return settings["decoders"] if settings["type"] == "Sequence" else [settings]


def _special_ids(tokenizer) -> frozenset[int]:
    return frozenset(k for k, token in tokenizer.added_tokens_decoder.items() if token.special)


def token_bytes(tokenizer) -> list[bytes | None]:
    """By id: the bytes that the token adds to the decoded text; None for special tokens, which the published decoding skips.

    Knows byte-level BPE (Qwen, GPT-2) and sentencepiece (pieces with U+2581 for space, `<0xNN>` for a byte).
    Raises ValueError for any other decoder.
    """
    kinds = {step["type"] for step in _decoders(tokenizer)}
    special = _special_ids(tokenizer)
    out: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values()) + 1)
    byte_of = _byte_of_char()
    runs = byte_run_ids(tokenizer)
    if "ByteLevel" not in kinds and not kinds & {"Metaspace", "Replace"}:
        raise ValueError(f"decoder {sorted(kinds)} is not known; byte-level BPE and sentencepiece tokenizers are")
    for token, k in tokenizer.get_vocab().items():
        if k in special:
            continue
        if k in runs:
            out[k] = bytes([int(token[3:5], 16)])
        elif "ByteLevel" in kinds and all(char in byte_of for char in token):
            out[k] = bytes(byte_of[char] for char in token)
        else:  # an added token of a byte-level tokenizer is plain text; a piece has its spaces marked
            out[k] = (token if "ByteLevel" in kinds else token.replace("\u2581", " ")).encode()
    return out


def byte_run_ids(tokenizer) -> frozenset[int]:
    """Ids of byte tokens (`<0xNN>`): a run of them is decoded whole, as text or as one U+FFFD a token."""
    if not any(step["type"] == "ByteFallback" for step in _decoders(tokenizer)):
        return frozenset()
    special = _special_ids(tokenizer)
    return frozenset(k for token, k in tokenizer.get_vocab().items() if k not in special and _BYTE_TOKEN.fullmatch(token))


def strips_leading_space(tokenizer) -> bool:
    """Whether decoding drops one space at the very beginning, as sentencepiece decoders do."""
    return any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _decoders(tokenizer)
    )


def stop_ids(tokenizer) -> tuple[int, ...]:
    """Ids that end an answer: `<|im_end|>` and `<|endoftext|>` where the vocabulary has them, else the tokenizer's end of sequence."""
    vocab = tokenizer.get_vocab()
    stops = tuple(vocab[token] for token in (IM_END, END_OF_TEXT) if token in vocab)
    if not stops and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end of sequence: set its eos_token")
    return stops or (tokenizer.eos_token_id,)


def never_sampled(tokenizer, vocab: int) -> np.ndarray:
    """bool [V]: image, video and vision tokens, and rows of the head past the tokenizer's vocabulary."""
    blocked_V = np.arange(vocab) >= len(tokenizer)
    for token, id in tokenizer.get_added_vocab().items():
        blocked_V[id] |= token.startswith("<|") and token not in (IM_END, END_OF_TEXT)
    return blocked_V


def answer_texts(tokenizer, tokens_PGR: np.ndarray, length_PG: np.ndarray) -> list[str]:
    """Texts of P * G answers, those of a prompt together. A length includes the stop token, which is skipped."""
    rows = zip(tokens_PGR.reshape(-1, tokens_PGR.shape[-1]), length_PG.reshape(-1), strict=True)
    return [tokenizer.decode(tokens_R[:length], skip_special_tokens=True) for tokens_R, length in rows]


def answer_ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Answers as tokens, each closed by the stop token."""
    stop = stop_ids(tokenizer)[0]
    return [[*ids, stop] for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def load_tokenizer(folder: str | Path):
    """The tokenizer of a checkpoint or run folder, never one from elsewhere. ValueError when it is missing or broken."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer {folder}: no tokenizer.json here; give a Hugging Face checkpoint's folder, or a run that was trained")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"tokenizer {folder}: cannot be read ({error}); copy or make the folder again") from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token k is byte k, and 256 the stop: for reading texts that no model wrote as tokens."""
    backend = Tokenizer(models.BPE(vocab=_byte_of_char() | {END_OF_TEXT: 256}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def train_byte_bpe(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens with Qwen's pre-tokenizer, special tokens and ChatML; equal texts give an equal tokenizer.

    All 256 bytes are in it, so that any text can be written. Raises ValueError if `vocab` leaves no room for merges.
    """
    if vocab < 320:
        raise ValueError(f"vocab={vocab} is too small: 256 bytes, {len(SPECIAL_TOKENS)} special tokens and the answer's words need 320")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()

    def with_form() -> Iterator[str]:
        for text in texts:
            yield text
            yield ANSWER_FORM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(with_form(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (IM_END, END_OF_TEXT)],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
