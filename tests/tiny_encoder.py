"""A sentence encoder of a few kilobytes, with the weights of the golden file: every word but w4 to w23 is the unknown one."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOLDEN = np.load(Path(__file__).parent / "fixtures" / "sentence_encoder.npz")
KINDS = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
MODULES = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in KINDS.items()]
WORDS = ["<s>", "<pad>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, 24)]


def tiny_encoder(path: Path) -> Path:
    """A sentence-transformers directory of a tiny XLM-RoBERTa with cls pooling, the architecture of BGE-M3."""
    config = dict(
        model_type="xlm-roberta", hidden_act="gelu", vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=20, max_position_embeddings=14, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "modules.json").write_text(json.dumps(MODULES))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True}))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.enable_padding(length=12, pad_id=1)
    tokenizer.save(str(path / "tokenizer.json"))
    save_file({name.removeprefix("weight/"): GOLDEN[name] for name in GOLDEN if name.startswith("weight/")}, path / "model.safetensors")
    return path
