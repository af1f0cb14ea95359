"""Tokens as bytes: what they add up to is what the tokenizer decodes."""

import io
import random

import pytest
from transformers import AutoTokenizer

from pgjax import tokenizer as t

TEXTS = [
    "<think>It is about baking bread; nothing is risky.</think>\n<answer>\nRequest:safe\nResponse:safe\nCategory:None\n</answer>",
    "<think>It asks how to loosen a bench in a park.</think>\n<answer>\nRequest:unsafe\nResponse:safe\nCategory:C2S1\n</answer>",
    "Crème brûlée costs 12.50 € in the café by the river, it's said.",
    "Policy\nC1: Loose benches\nC1S1: Park benches\nC2: Borrowed umbrellas\nC10S3: Umbrellas of unknown colour",
] * 12


def byte_level(extra: tuple[str, ...] = ()):
    """A small byte-level BPE; `extra` are added tokens that are not special."""
    tokenizer = t.train_byte_bpe(TEXTS, 420)
    tokenizer.add_tokens(list(extra))
    return tokenizer


def sentencepiece(folder):
    """A small sentencepiece BPE with byte fallback, read the way Llama's is."""
    spm = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines()]), model_writer=model, vocab_size=420,
        byte_fallback=True, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return LlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    return byte_level(("<think>", "two words")) if request.param == "byte_level" else sentencepiece(tmp_path_factory.mktemp("pieces"))


def decoded(ids: list[int], pieces: list[bytes | None], runs: frozenset[int], strips: bool) -> str:
    """The decoding that `token_bytes`, `byte_run_ids` and `strips_leading_space` describe."""
    out, run = b"", b""
    for k in [*(k for k in ids if pieces[k] is not None), None]:
        if k in runs:
            run += pieces[k]
            continue
        try:
            out += run.decode().encode()
        except UnicodeDecodeError:
            out += "\ufffd".encode() * len(run)
        out, run = out + (b"" if k is None else pieces[k]), b""
    text = out.decode(errors="replace")
    return text[1:] if strips and text.startswith(" ") else text


def test_bytes_add_up_to_the_decoded_text(tokenizer):
    rng = random.Random(0)
    facts = t.token_bytes(tokenizer), t.byte_run_ids(tokenizer), t.strips_leading_space(tokenizer)
    count = len(facts[0])
    for _ in range(2000):
        ids = [rng.randrange(count) for _ in range(rng.randrange(1, 12))]
        assert decoded(ids, *facts) == tokenizer.decode(ids, skip_special_tokens=True)
    for text in TEXTS[:4]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert decoded(ids, *facts) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_only_special_tokens_are_skipped():
    tokenizer = byte_level(("<think>",))
    pieces, vocab = t.token_bytes(tokenizer), tokenizer.get_vocab()
    assert pieces[vocab["<think>"]] == b"<think>"
    assert [k for k, piece in enumerate(pieces) if piece is None] == sorted(vocab[token] for token in t.SPECIAL_TOKENS)
    assert {bytes([b]) for b in range(256)} <= set(pieces)


def test_stop_ids(tokenizer):
    names = ["</s>"] if t.strips_leading_space(tokenizer) else ["<|im_end|>", "<|endoftext|>"]
    assert t.stop_ids(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(names))


def test_training_is_deterministic_and_reloads(tmp_path):
    tokenizer = byte_level()
    assert tokenizer.get_vocab() == byte_level().get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template
    assert t.token_bytes(again) == t.token_bytes(tokenizer) and t.stop_ids(again) == t.stop_ids(tokenizer)
    hostile = "é \u2028\n\n  日本 \U0001f600 12,5"
    assert again.decode(again(hostile)["input_ids"]) == hostile


def test_words_of_an_answer_are_tokens():
    tokenizer = t.train_byte_bpe(["A text without any of them."], 400)
    tokens = tokenizer.tokenize("Request:safe\nResponse:unsafe\nCategory:None")
    assert tokens == ["Request", ":safe", "Ċ", "Response", ":unsafe", "Ċ", "Category", ":None"]


def test_chat_template():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    ]
    text = byte_level().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_errors():
    with pytest.raises(ValueError, match="too small"):
        t.train_byte_bpe(TEXTS, 300)
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = t.decoders.CTC()
    with pytest.raises(ValueError, match="not known"):
        t.token_bytes(tokenizer)
