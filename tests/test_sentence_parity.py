"""Tiny random BERT and XLM-RoBERTa directories against transformers and torch, and XLM-RoBERTa's tokens from a sentencepiece model."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from tiny_encoder import MODULES

from pgjax.models.sentence_encoder import load_embedder
from pgjax.models.sentence_files import find_files

pytestmark = pytest.mark.parity
TEXTS = [
    "Rain falls on the small garden",
    "the Slug eats  lettuce, and more lettuce!",
    "a snail",
    "",
    "Caf\u00e9 \u2460 \u732b\u732b na\u00efve \ufb01sh\tand chips",
    "the garden of the slug is a small garden and the rain of the garden is the rain of the slug",
]
BERT_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] rain falls on the small garden slug eat ##s lettuce , and more ! a sn ##ail cafe of is".split()


def vocabulary(folder, kind: str) -> int:
    """Writes vocab.txt or sentencepiece.bpe.model; how many ids the model has."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    if kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
        return len(BERT_WORDS)
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:3] * 4), model_writer=made, vocab_size=48, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(made.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue()).get_piece_size() + 2


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def tiny(request, tmp_path_factory):
    """A directory without pooling; its transformers model and tokenizer."""
    torch = pytest.importorskip("torch")
    import transformers

    folder, kind = tmp_path_factory.mktemp("tiny"), request.param
    name = {"bert": "Bert", "xlm-roberta": "XLMRoberta"}[kind]
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20, initializer_range=0.3)
    vocab = vocabulary(folder, kind)
    special = dict(pad_token_id=0, type_vocab_size=2) if kind == "bert" else dict(pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab, max_position_embeddings=20, **special, **size)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():  # biases and norms start as 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokenizer = getattr(transformers, f"{name}Tokenizer").from_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "1_Pooling").mkdir()
    return folder, model, tokenizer


def reference(model, tokenizer, mode: str) -> np.ndarray:
    import torch

    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=18, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = hidden[:, 0] if mode == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled).numpy()


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_vectors_from_both_kinds_of_weights(tiny, mode):
    import torch

    folder, model, tokenizer = tiny
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({f"pooling_mode_{m}": m.startswith(mode) for m in ("cls_token", "mean_tokens")})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 18}))
    expected = reference(model, tokenizer, mode)
    np.testing.assert_allclose(load_embedder(folder).texts(TEXTS, batch=6), expected, atol=1e-6)

    state = {f"{model.base_model_prefix}.{name}": value for name, value in model.state_dict().items()}
    name = next(name for name in state if name.endswith("intermediate.dense.weight"))
    state[name] = state[name].T.contiguous().T  # in another order on disk
    torch.save(state | {"lm_head.bias": torch.zeros(3)}, folder / "pytorch_model.bin")
    weights = (folder / "model.safetensors").rename(folder / "elsewhere")
    try:
        assert find_files(folder).weights.name == "pytorch_model.bin"
        np.testing.assert_allclose(load_embedder(folder).texts(TEXTS, batch=6), expected, atol=1e-6)
    finally:
        weights.rename(folder / "model.safetensors")


def test_tokens_of_the_vocabulary_and_of_tokenizer_json(tiny, tmp_path):
    """The tokens are compared whole, and cut; from the vocabulary alone, and from the file that transformers writes."""
    folder, _, tokenizer = tiny
    tokenizer.save_pretrained(tmp_path)
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    for source in (None, tmp_path / "tokenizer.json"):
        if source:
            (folder / "tokenizer.json").write_text(source.read_text())
        encode = find_files(folder).read_tokenizer(10**6)
        assert encode(TEXTS, 99) == tokenizer(TEXTS)["input_ids"]
        assert encode(TEXTS, 7) == tokenizer(TEXTS, truncation=True, max_length=7)["input_ids"]
    (folder / "tokenizer.json").unlink()
    seen = {token for ids in encode(TEXTS, 99) for token in ids}
    assert tokenizer.unk_token_id in seen and len(seen) > 15
