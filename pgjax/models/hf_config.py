"""ModelConfig from a checkpoint directory's config.json, and back. Reads the spellings of transformers 4 (flat text keys,
`rope_scaling`) and 5 (`text_config`, `rope_parameters`)."""

import dataclasses
from pathlib import Path
from typing import Any

from pgjax.config import ModelConfig, TextConfig, VisionConfig
from pgjax.files import read_json
from pgjax.models.processing import processing_from_hf

ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}


class Fields:
    """One object of config.json: what is asked for must be there, and an error says where it is not."""

    def __init__(self, where: str, raw: dict[str, Any]):
        self.where, self.raw = where, raw

    def __call__(self, *names: str) -> Any:
        """The first of these keys that is there."""
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        raise ValueError(f"{self.where}: {' or '.join(names)} is missing; copy the checkpoint's config.json again")

    def must_be(self, name: str, *values: Any) -> None:
        """A key that is there must have one of these values: pgjax computes nothing else."""
        if name in self.raw and self.raw[name] not in values:
            raise ValueError(f"{self.where}: {name} {self.raw[name]!r} is not supported; it must be {' or '.join(map(repr, values))}")


def config_from_hf(path: Path) -> ModelConfig:
    """ModelConfig of a checkpoint directory. ValueError names a model type or field that is not supported, or one that is missing."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no config.json here; point to a Hugging Face checkpoint directory")
    raw = read_json(file)
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type {family!r} is not supported; it must be {' or '.join(ARCHITECTURES)}")
    top = Fields(str(file), raw)
    top.must_be("quantization_config", None)
    text, vision = Fields(f"{file}: text_config", raw.get("text_config") or raw), Fields(f"{file}: vision_config", top("vision_config"))
    read = {"qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3}[family]
    config = read(text, vision, bool(raw.get("tie_word_embeddings", text.raw.get("tie_word_embeddings", False))))
    if (width := vision.raw.get("out_hidden_size", config.text.width)) != config.text.width:
        raise ValueError(f"{file}: vision_config.out_hidden_size {width} must equal the decoder's hidden_size {config.text.width}")
    return dataclasses.replace(config, vision=processing_from_hf(Path(path), family, config.vision))


def _text(text: Fields, tied: bool, **family: Any) -> TextConfig:
    rope = Fields(f"{text.where}.rope_parameters", text("rope_parameters", "rope_scaling"))
    text.must_be("hidden_act", "silu")
    text.must_be("use_sliding_window", False, None)
    for key in ("rope_type", "type"):
        rope.must_be(key, "default", "mrope")
    heads = text("num_attention_heads")
    return TextConfig(
        vocab=text("vocab_size"),
        width=text("hidden_size"),
        layers=text("num_hidden_layers"),
        heads=heads,
        kv_heads=text("num_key_value_heads"),
        head_dim=text.raw.get("head_dim") or text("hidden_size") // heads,
        mlp=text("intermediate_size"),
        rope_theta=float(rope.raw.get("rope_theta") or text("rope_theta")),
        mrope_section=tuple(rope("mrope_section")),
        eps=text("rms_norm_eps"),
        tied=tied,
        **family,
    )


def _vision(vision: Fields, activation: str, **family: Any) -> VisionConfig:
    vision.must_be("hidden_act", activation)
    return VisionConfig(
        width=vision("hidden_size"),
        depth=vision("depth"),
        heads=vision("num_heads"),
        mlp=vision("intermediate_size"),
        patch=vision("patch_size", "spatial_patch_size"),
        temporal=vision("temporal_patch_size"),
        merge=vision("spatial_merge_size"),
        channels=vision("in_channels", "in_chans"),
        **family,
    )


def _qwen2_5(text: Fields, vision: Fields, tied: bool) -> ModelConfig:
    windows = dict(window=vision("window_size"), full_blocks=tuple(vision("fullatt_block_indexes")))
    return ModelConfig("qwen2_5_vl", _text(text, tied), _vision(vision, "silu", **windows))


def _qwen3(text: Fields, vision: Fields, tied: bool) -> ModelConfig:
    text.must_be("attention_bias", False)
    side = round(vision("num_position_embeddings") ** 0.5)
    if side**2 != vision("num_position_embeddings"):
        raise ValueError(f"{vision.where}: num_position_embeddings {vision('num_position_embeddings')} is not a square grid")
    tower = _vision(
        vision, "gelu_pytorch_tanh", window=0, full_blocks=(), positions=side, deepstack=tuple(vision("deepstack_visual_indexes"))
    )
    return ModelConfig("qwen3_vl", _text(text, tied, qkv_bias=False, qk_norm=True, mrope_interleaved=True), tower)


def config_to_hf(config: ModelConfig, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of transformers 5 (4.57 reads it too). `token_ids` are those of IMAGE_PAD and its like, by their config keys."""
    t, v = config.text, config.vision
    rope = {"rope_type": "default", "rope_theta": t.rope_theta, "mrope_section": list(t.mrope_section)}
    text = {
        "model_type": f"{config.family}_text",
        "vocab_size": t.vocab,
        "hidden_size": t.width,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_dim,
        "intermediate_size": t.mlp,
        "hidden_act": "silu",
        "rms_norm_eps": t.eps,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": t.tied,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # generation_config.json has them
    }
    vision = {
        "hidden_size": v.width,
        "depth": v.depth,
        "num_heads": v.heads,
        "intermediate_size": v.mlp,
        "patch_size": v.patch,
        "temporal_patch_size": v.temporal,
        "spatial_merge_size": v.merge,
        "in_channels": v.channels,
        "out_hidden_size": t.width,
    }
    if config.family == "qwen2_5_vl":
        text |= {"use_sliding_window": False}
        vision |= {"model_type": "qwen2_5_vl", "hidden_act": "silu", "window_size": v.window, "fullatt_block_indexes": list(v.full_blocks)}
        vision |= {"tokens_per_second": 2}
    else:
        rope |= {"mrope_interleaved": True}
        text |= {"attention_bias": False}
        vision |= {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "num_position_embeddings": v.positions**2}
        vision |= {"deepstack_visual_indexes": list(v.deepstack)}
    # rope_scaling and rope_theta are what transformers 4 and vLLM read.
    text |= {"rope_parameters": rope, "rope_theta": t.rope_theta, "rope_scaling": rope}
    parts = {"text_config": text, "vision_config": vision}
    return {"architectures": [ARCHITECTURES[config.family]], "model_type": config.family, "tie_word_embeddings": t.tied} | parts | token_ids
