"""config.json of checkpoints in and out: released spellings old and new, and what is not supported by name."""

import json
from dataclasses import replace

import pytest
from golden.make_qwen import CASES

from pgjax.config import ModelConfig, Recipe, TextConfig, VisionConfig
from pgjax.models.hf_config import config_from_hf, config_to_hf, with_checkpoint
from pgjax.models.released import RELEASED

# As the released Qwen2.5-VL-7B has it: text keys at the top, rope_scaling beside rope_theta, older names in the vision part.
OLD = dict(
    model_type="qwen2_5_vl", hidden_act="silu", hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
    num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0, use_sliding_window=False, sliding_window=32768, vocab_size=152064,
    tie_word_embeddings=False, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    vision_config=dict(
        depth=32, hidden_act="silu", hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3, out_hidden_size=3584,
        patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2, temporal_patch_size=2,
    ),
)  # fmt: skip


def read(folder, raw):
    (folder / "config.json").write_text(json.dumps(raw))
    return config_from_hf(folder)


def test_the_released_spelling_is_read(tmp_path):
    config = read(tmp_path, OLD)
    assert config.text == TextConfig() and config.vision == VisionConfig(max_pixels=3584**2)
    assert config == RELEASED["Qwen2.5-VL-7B"]


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_written_is_read_again(name, tmp_path):
    assert read(tmp_path, config_to_hf(RELEASED[name], {"image_token_id": 151655})) == RELEASED[name]


def change(raw: dict, path: str, value) -> dict:
    key, _, rest = path.partition(".")
    if rest:
        return raw | {key: change(raw[key], rest, value)}
    return raw | {key: value} if value is not KeyError else {k: v for k, v in raw.items() if k != key}


@pytest.mark.parametrize(
    "case, path, value, says",
    [
        ("old", "model_type", KeyError, "config.json: model_type is missing"),
        ("old", "model_type", ["qwen3_vl"], "config.json: model_type: .* is not str"),
        ("old", "model_type", "llama", "model_type 'llama' is not supported; it must be qwen2_5_vl or qwen3_vl"),
        ("old", "model_type", "qwen3_vl_moe", "model_type 'qwen3_vl_moe' is not supported"),
        ("old", "hidden_act", "gelu", "text_config: hidden_act 'gelu' is not supported; it must be silu"),
        ("old", "use_sliding_window", True, "use_sliding_window True is not supported"),
        ("old", "rope_scaling", {"type": "yarn", "mrope_section": [1, 2, 3]}, "rope_parameters: type 'yarn' is not supported"),
        ("old", "rope_scaling.mrope_section", KeyError, "text_config: mrope_section is missing"),
        ("old", "hidden_size", KeyError, "text_config: hidden_size is missing"),
        ("old", "vision_config", KeyError, "config.json: vision_config is missing"),
        ("old", "vision_config.window_size", KeyError, "vision_config: window_size is missing"),
        ("old", "vision_config.hidden_act", "gelu", "vision_config: hidden_act 'gelu' is not supported"),
        ("old", "vision_config.out_hidden_size", 7, "vision_config: out_hidden_size 7 is not supported; it must be 3584"),
        ("old", "quantization_config", {"bits": 4}, "quantization_config .* is not supported"),
        ("old", "attention_bias", False, "text_config: attention_bias False is not supported; it must be True"),
        (
            "old",
            "layer_types",
            ["full_attention", "sliding_attention"],
            "layer_types 'sliding_attention' is not supported; it must be full_a",
        ),
        ("old", "rope_scaling.mrope_interleaved", True, "rope_parameters: mrope_interleaved True is not supported; it must be False"),
        ("qwen3", "text_config.rope_parameters.mrope_interleaved", False, "mrope_interleaved False is not supported; it must be True"),
        ("qwen3", "text_config.attention_bias", True, "attention_bias True is not supported; it must be False"),
        ("qwen3", "text_config.head_dim", KeyError, "text_config: head_dim is missing"),
        *(("qwen3", "vision_config.num_position_embeddings", n, f"num_position_embeddings {n} is not a square grid") for n in (24, -4)),
        # JSON of another type
        ("old", "hidden_size", "3584", "text_config: hidden_size: '3584' is not int"),
        ("old", "num_hidden_layers", 28.0, "text_config: num_hidden_layers: 28.0 is not int"),
        ("old", "rms_norm_eps", "1e-6", "text_config: rms_norm_eps: '1e-6' is not float"),
        ("old", "tie_word_embeddings", "false", "text_config: tie_word_embeddings: 'false' is not bool"),
        ("old", "rope_scaling", "yarn", "text_config: rope_scaling: 'yarn' is not dict"),
        ("old", "rope_scaling.mrope_section", 16, "text_config: mrope_section: 16 is not tuple"),
        ("old", "vision_config", [], r"config.json: vision_config: \[\] is not dict"),
        ("old", "vision_config.fullatt_block_indexes", [7, "15"], r"vision_config: fullatt_block_indexes\[1\]: '15' is not int"),
        ("qwen3", "text_config", "small", "config.json: text_config: 'small' is not dict"),
        # sizes that no model has
        ("old", "num_attention_heads", 0, "config.json: model.text.heads 0 must be above 0"),
        ("old", "num_key_value_heads", 3, "heads 28 must be a multiple of kv_heads 3"),
        ("old", "head_dim", 64, "model.text.width 3584 must be heads x head_dim 1792 with family qwen2_5_vl"),
        ("old", "vision_config.patch_size", 0, "model.vision.patch 0 must be above 0"),
        ("qwen3", "vision_config.num_position_embeddings", 0, "model.vision.positions 0 must be above 0 with family qwen3_vl"),
        ("qwen3", "vision_config.deepstack_visual_indexes", KeyError, "vision_config: deepstack_visual_indexes is missing"),
    ],
)
def test_what_is_not_supported_is_named(case, path, value, says, tmp_path):
    raw = OLD if case == "old" else CASES["qwen3"]
    with pytest.raises(ValueError, match=says) as error:
        read(tmp_path, change(raw, path, value))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, longest", [("Qwen2.5-VL-7B", 128000), ("Qwen3-VL-8B", 262144)])
def test_the_longest_context_is_the_released_one(name, longest):
    assert config_to_hf(RELEASED[name], {})["text_config"]["max_position_embeddings"] == longest


def test_a_recipe_takes_the_model_of_its_checkpoint(tmp_path):
    recipe = Recipe(model=ModelConfig(lora_rank=4), checkpoint=str(tmp_path))
    told = read(tmp_path, config_to_hf(RELEASED["Qwen3-VL-2B"], {}))
    assert with_checkpoint(recipe) == replace(recipe, model=replace(told, lora_rank=4))
    assert with_checkpoint(replace(recipe, not_a_guard=True)).not_a_guard
    assert with_checkpoint(replace(recipe, checkpoint=None)) == replace(recipe, checkpoint=None)


@pytest.mark.parametrize("mark", [True, False])
def test_the_mark_of_a_toy_is_not_lost_by_training_on(mark, tmp_path):
    read(tmp_path, OLD | {"pgjax": {"run": "toy", "not_a_guard": mark}})
    assert with_checkpoint(Recipe(checkpoint=str(tmp_path))).not_a_guard is mark


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json here; point to a Hugging Face checkpoint directory"):
        config_from_hf(tmp_path / "nowhere")
