"""ModelConfig from a checkpoint directory's config.json, and back. Reads the spellings of transformers 4 (flat text keys,
`rope_scaling`) and 5 (`text_config`, `rope_parameters`)."""

import math
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgjax.config import ModelConfig, Recipe, TextConfig, VisionConfig
from pgjax.files import read_json
from pgjax.models.processing import processing_from_hf
from pgjax.recipes import model_problems, typed

ARCHITECTURES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
ACTIVATION = {"qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}  # of the tower
# Our fields and their keys: the one to write, then an older spelling.
ROPE = dict(rope_theta="rope_theta", mrope_section="mrope_section")
TEXT = dict(
    vocab="vocab_size", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", kv_heads="num_key_value_heads",
    head_dim="head_dim", mlp="intermediate_size", eps="rms_norm_eps", tied="tie_word_embeddings",
)  # fmt: skip
TOWER = dict(
    width="hidden_size", depth="depth", heads="num_heads", mlp="intermediate_size", patch="patch_size spatial_patch_size",
    temporal="temporal_patch_size", merge="spatial_merge_size", channels="in_channels in_chans",
)  # fmt: skip
VISION = {
    "qwen2_5_vl": TOWER | dict(window="window_size", full_blocks="fullatt_block_indexes"),
    "qwen3_vl": TOWER | dict(deepstack="deepstack_visual_indexes"),
}


class Fields:
    """One object of config.json: what is asked for must be there and of its type, and an error says where it is not. null is not there."""

    def __init__(self, where: str, raw: Any):
        self.where = where
        self.raw = {key: value for key, value in typed(dict, raw, where).items() if value is not None}

    def __call__(self, kind: Any, *names: str) -> Any:
        """The first of these keys that is there."""
        for name in names:
            if name in self.raw:
                return typed(kind, self.raw[name], f"{self.where}: {name}")
        raise ValueError(f"{self.where}: {' or '.join(names)} is missing; copy the checkpoint's config.json again")

    def read(self, kind: type, keys: dict[str, str], **more: Any) -> Any:
        """A config of that kind: the fields of the table, and `more`."""
        hints = typing.get_type_hints(kind)
        return kind(**{field: self(hints[field], *names.split()) for field, names in keys.items()}, **more)

    def must_be(self, name: str, *values: Any) -> None:
        """A key that is there must have one of these values, in a list everywhere: pgjax computes nothing else."""
        told = self.raw.get(name, values[0])
        for value in told if isinstance(told, list) else [told]:
            if value not in values:
                raise ValueError(f"{self.where}: {name} {value!r} is not supported; it must be {' or '.join(map(str, values))}")


def config_from_hf(path: Path) -> ModelConfig:
    """ModelConfig of a checkpoint directory. ValueError names a model type or field that is not supported, misfits or is missing."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no config.json here; point to a Hugging Face checkpoint directory")
    top = Fields(str(file), read_json(file))
    family = top(str, "model_type")
    top.must_be("model_type", *ARCHITECTURES)
    top.must_be("quantization_config", None)
    vision = Fields(f"{file}: vision_config", top(dict, "vision_config"))
    vision.must_be("hidden_act", ACTIVATION[family])
    own: dict[str, Any] = {}
    if family == "qwen3_vl":
        grid = vision(int, "num_position_embeddings")
        own = dict(window=0, full_blocks=(), positions=math.isqrt(max(grid, 0)))
        if own["positions"] ** 2 != grid:
            raise ValueError(f"{vision.where}: num_position_embeddings {grid} is not a square grid")
    text = _text(top, family == "qwen3_vl")
    vision.must_be("out_hidden_size", text.width)
    tower = processing_from_hf(Path(path), family, vision.read(VisionConfig, VISION[family], **own))
    config = ModelConfig(family, text, tower)
    if problems := model_problems(config):
        raise ValueError(f"{file}: " + "; ".join(problems))
    return config


def _text(top: Fields, qwen3: bool) -> TextConfig:
    flat = Fields(f"{top.where}: text_config", top.raw.get("text_config") or top.raw)
    rope = Fields(f"{flat.where}.rope_parameters", flat(dict, "rope_parameters", "rope_scaling"))
    tied = top.raw.get("tie_word_embeddings", flat.raw.get("tie_word_embeddings", False))
    text = Fields(flat.where, flat.raw | rope.raw | {"tie_word_embeddings": tied})  # rope_theta may stand in either
    for key in ("rope_type", "type"):
        rope.must_be(key, "default", "mrope")
    rope.must_be("mrope_interleaved", qwen3)
    text.must_be("attention_bias", not qwen3)  # that of q, k and v
    for key, value in (("hidden_act", "silu"), ("use_sliding_window", False), ("layer_types", "full_attention")):
        text.must_be(key, value)
    if not qwen3:
        text.raw.setdefault("head_dim", text(int, "hidden_size") // max(1, text(int, "num_attention_heads")))
    return text.read(TextConfig, TEXT | ROPE, qkv_bias=not qwen3, qk_norm=qwen3, mrope_interleaved=qwen3)


def with_checkpoint(recipe: Recipe) -> Recipe:
    """The recipe with family, text and vision of its checkpoint, and with the mark of a checkpoint of ours that is not a guard; as it is
    without a checkpoint. ValueError as `config_from_hf`."""
    if recipe.checkpoint is None:
        return recipe
    folder = Path(recipe.checkpoint)
    told = config_from_hf(folder)
    model = replace(recipe.model, family=told.family, text=told.text, vision=told.vision)
    own = Fields(f"{folder / 'config.json'}: pgjax", read_json(folder / "config.json").get("pgjax", {}))
    return replace(recipe, model=model, not_a_guard=recipe.not_a_guard or bool(own.raw.get("not_a_guard")))


def config_to_hf(config: ModelConfig, token_ids: dict[str, int]) -> dict[str, Any]:
    """config.json of transformers 5. `token_ids` are those of IMAGE_PAD and its like, by their config keys."""
    family, qwen3 = config.family, config.family == "qwen3_vl"
    rope = {"rope_type": "default"} | _written(config.text, ROPE) | ({"mrope_interleaved": True} if qwen3 else {})
    text = _written(config.text, TEXT) | {"model_type": f"{family}_text", "hidden_act": "silu"}
    text |= {"attention_bias": False} if qwen3 else {"use_sliding_window": False}
    text |= {"max_position_embeddings": 262144 if qwen3 else 128000}
    text |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # generation_config.json has them
    # rope_scaling and rope_theta are what transformers 4 and vLLM read.
    text |= {"rope_parameters": rope, "rope_theta": config.text.rope_theta, "rope_scaling": rope}
    vision = _written(config.vision, VISION[family]) | {"model_type": family, "hidden_act": ACTIVATION[family]}
    vision |= {"num_position_embeddings": config.vision.positions**2} if qwen3 else {"tokens_per_second": 2}
    parts = {"text_config": text, "vision_config": vision | {"out_hidden_size": config.text.width}}
    return {"architectures": [ARCHITECTURES[family]], "model_type": family, "tie_word_embeddings": config.text.tied} | parts | token_ids


def _written(part: TextConfig | VisionConfig, keys: dict[str, str]) -> dict[str, Any]:
    """The table the other way round; JSON has lists for tuples."""
    values = {names.split()[0]: getattr(part, field) for field, names in keys.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
