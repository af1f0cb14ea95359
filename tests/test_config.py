"""Recipes: files, typed overrides, JSON and the checks across fields."""

import re
from dataclasses import replace

import pytest

from pgjax.config import (
    DataConfig,
    GRPOConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OODConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    TextConfig,
    VisionConfig,
    WarmUpConfig,
)
from pgjax.recipes import from_json, load_recipe, model_problems, override, to_json, validate


def test_defaults_are_valid():
    assert validate(Recipe()) == Recipe()


def test_override_is_typed():
    argv = "--grpo.optimizer.learning-rate 2e-6 --data.ood.keep 2 4 --data.ood.never-seen C1 C2S1 --rollout.constrained True"
    recipe = override(Recipe(), argv.split())
    assert recipe.grpo.optimizer.learning_rate == 2e-6
    assert recipe.data.ood == OODConfig(keep=(2, 4), never_seen=("C1", "C2S1"))
    assert recipe.rollout.constrained is True
    assert override(recipe, ["--data.ood.keep", "None", "--model.text.mrope_section", "2", "3", "3"]).data.ood.keep is None
    assert override(recipe, []) == recipe


@pytest.mark.parametrize(
    "argv, nearest",
    [
        ("--grpo.optimizer.lr 1", "--grpo.optimizer.learning-rate"),
        ("--grpo.learning-rate 1", "--grpo.optimizer.learning-rate"),
        ("--rollout.gruop=4", "--rollout.group"),
        ("--mesh.tensors 2", "--mesh.tensor"),
        ("--lr 1", "--grpo.optimizer.learning-rate"),
        ("--grpo.lr 1", "--grpo.optimizer.learning-rate"),
        ("--warm-up.lr 1", "--warm-up.optimizer.learning-rate"),
        ("--tempreature 1", "--rollout.temperature"),
    ],
)
def test_unknown_key_names_the_nearest(argv, nearest):
    with pytest.raises(ValueError, match=rf"unknown key --\S+, did you mean {nearest}\?") as error:
        override(Recipe(), argv.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--grpo.steps abc", "--grpo.steps.*abc"),
        ("--grpo.steps", "--grpo.steps"),
        ("--grpo.loss.aggregation median", "median.*token_mean"),
        ("--data.ood.keep 1", "keep"),
        ("stray", "'stray' is not a key"),
    ],
)
def test_bad_values_are_one_line(argv, words, capsys):
    with pytest.raises(ValueError, match=words) as error:
        override(Recipe(), argv.split())
    assert "\n" not in str(error.value) and "---" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_json_round_trip():
    recipe = Recipe(
        data=DataConfig(ood=OODConfig(keep=(2, 4), never_seen=("C1",))),
        rollout=RolloutConfig(lanes=3),
        model=ModelConfig(vision=VisionConfig(full_blocks=(1, 3))),
        checkpoint="somewhere",
    )
    assert from_json(to_json(recipe)) == recipe
    assert from_json('{"grpo": {"loss": {"clip_low": 0}}}').grpo.loss.clip_low == 0.0


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ('{"grpo": {"stepz": 1}}', "recipe.grpo: unknown key stepz, did you mean steps"),
        ('{"grpo": {"steps": 1.5}}', "recipe.grpo.steps: 1.5 is not int"),
        ('{"grpo": 1}', "recipe.grpo: expected an object"),
        ('{"data": {"ood": {"keep": [1]}}}', "recipe.data.ood.keep"),
        ('{"reward": {"variant": "kind"}}', "recipe.reward.variant"),
        ('{"rollout": {"constrained": 1}}', "recipe.rollout.constrained: 1 is not bool"),
        ('{"model": {"vision": {"full_blocks": [1, "2"]}}}', r"recipe.model.vision.full_blocks\[1\]: '2' is not int"),
    ],
)
def test_json_errors_say_where(text, words):
    with pytest.raises(ValueError, match=words):
        from_json(text)


def test_load_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text("from pgjax.config import Recipe\nrecipe = Recipe(name='small')\n")
    (tmp_path / "bad.py").write_text("recipe = 3\n")
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    assert load_recipe("small").name == load_recipe("configs/small.py").name == "small"
    for name, words in {"smal": "did you mean small", "bad.py": "must set", "broken.py": "nowhere_at_all", "no.py": "no such file"}.items():
        with pytest.raises(ValueError, match=words):
            load_recipe(name)


BASE = Recipe()


def vision(family="qwen2_5_vl", **fields) -> Recipe:
    return replace(BASE, model=ModelConfig(family=family, vision=VisionConfig(**fields)))


QWEN3 = ModelConfig(
    "qwen3_vl",
    TextConfig(width=2048, heads=32, qkv_bias=False, qk_norm=True, mrope_interleaved=True),  # Qwen3 has a head_dim of its own
    VisionConfig(
        window=0, full_blocks=(), patch=16, positions=48, deepstack=(8, 16, 24), mean=(0.0, 0.5, 1.0), min_pixels=64, max_pixels=64
    ),
)


def test_both_families_are_valid():
    for model in (ModelConfig(), QWEN3):
        assert validate(replace(BASE, model=replace(model, freeze_vision=True, lora_rank=8)))
    assert validate(replace(BASE, model=QWEN3, data=DataConfig(patches=100)))


QWEN2_5_NEEDS = ("text.qkv_bias False must be True", "text.qk_norm True must be False", "text.mrope_interleaved True must be False",
                 "vision.window 0 must be above 0", "vision.positions 48 must be 0", r"vision.deepstack \(8, 16, 24\) must be \(\)",
                 "text.width 2048 must be heads x head_dim 4096")  # fmt: skip
QWEN3_NEEDS = ("text.qkv_bias True must be False", "text.qk_norm False must be True", "text.mrope_interleaved False must be True",
               "vision.window 112 must be 0", "vision.positions 0 must be above 0")  # fmt: skip


@pytest.mark.parametrize("family, model, needs", [("qwen2_5_vl", QWEN3, QWEN2_5_NEEDS), ("qwen3_vl", ModelConfig(), QWEN3_NEEDS)])
def test_a_mixture_of_families_is_refused(family, model, needs):
    problems = model_problems(replace(model, family=family))
    assert len(problems) == len(needs)
    for words in needs:
        assert any(re.fullmatch(f"model.{words} with family {family}", problem) for problem in problems), words


@pytest.mark.parametrize("trained", [dict(freeze_vision=True), dict(lora_rank=8)])
def test_no_warm_up_of_a_part(trained):
    recipe = replace(BASE, model=replace(BASE.model, **trained), warm_up=WarmUpConfig(steps=2))
    assert validate(recipe) and validate(replace(recipe, checkpoint="somewhere", warm_up=WarmUpConfig()))
    with pytest.raises(ValueError, match="warm_up.steps 2 with a checkpoint.*the warm-up trains the whole model; set warm_up.steps 0"):
        validate(replace(recipe, checkpoint="somewhere"))


@pytest.mark.parametrize(
    "recipe, words",
    [
        (replace(BASE, grpo=GRPOConfig(prompts=10, mini_prompts=4, micro_prompts=4)), "mini_prompts 4 must divide prompts 10"),
        (replace(BASE, grpo=GRPOConfig(mini_prompts=32, micro_prompts=5)), "micro_prompts 5 must divide"),
        (replace(BASE, model=ModelConfig(text=TextConfig(mrope_section=(1, 2, 3)))), "mrope_section"),
        (replace(BASE, model=ModelConfig(text=TextConfig(kv_heads=3))), "kv_heads 3"),
        (replace(BASE, model=ModelConfig(vision=VisionConfig(window=100))), "window 100"),
        (replace(BASE, data=DataConfig(patches=100)), "data.patches 100"),
        (vision(window=-28), "window -28 must be at least 0"),
        (vision(window=7), "window 7 must be a multiple of patch x merge 28"),
        (vision(window=0, full_blocks=(32,)), "full_blocks"),
        (vision("qwen3_vl", window=0, deepstack=(8, 32)), r"deepstack \(8, 32\) must grow and lie below depth 32"),
        (vision("qwen3_vl", window=0, deepstack=(8, 5)), r"deepstack \(8, 5\) must grow"),
        (vision("qwen3_vl", window=0, deepstack=tuple(range(29))), "more blocks than model.text.layers 28"),
        (vision(mean=(0.5, 0.5, 1.5)), r"vision.mean \(0.5, 0.5, 1.5\) must be in 0 to 1"),
        (vision(std=(0.5, 0.0, 0.5)), r"vision.std \(0.5, 0.0, 0.5\) must be above 0"),
        (vision(std=(0.5, float("nan"), 0.5)), r"vision.std \(0.5, nan, 0.5\) must be a finite number"),
        (vision(min_pixels=0), "min_pixels 0 must be above 0"),
        (vision(min_pixels=200, max_pixels=100), "min_pixels 200 must not be above max_pixels 100"),
        (replace(BASE, model=ModelConfig(lora_rank=-1)), "lora_rank -1 must be at least 0"),
        (replace(BASE, model=ModelConfig(lora_alpha=0.0)), "lora_alpha 0.0 must be above 0"),
        (replace(BASE, data=DataConfig(ood=OODConfig(share=1.5))), "share 1.5 must be in 0 to 1"),
        (replace(BASE, data=DataConfig(ood=OODConfig(keep=(4, 2)))), "keep"),
        (replace(BASE, data=DataConfig(max_pixels=0)), "data.max_pixels 0 must be at least 1"),
        (replace(BASE, tokenizer_vocab=100), "tokenizer_vocab 100 must be 0 .* or at least 320"),
        (replace(BASE, grpo=GRPOConfig(loss=LossConfig(dual_clip=0.5))), r"grpo.loss.dual_clip 0.5 must be 0 \(off\) or above 1"),
        (replace(BASE, grpo=GRPOConfig(optimizer=OptimizerConfig(b2=1.0))), "grpo.optimizer.b2 1.0 must be from 0 to below 1"),
        (
            replace(BASE, warm_up=WarmUpConfig(optimizer=OptimizerConfig(decay_updates=-1))),
            "warm_up.optimizer.decay_updates -1 must be at least 0",
        ),
        (replace(BASE, rollout=RolloutConfig(top_p=0.0)), "top_p 0.0 must be above 0, at most 1"),
        (replace(BASE, rollout=RolloutConfig(group=0)), "group 0 must be at least 1"),
        (replace(BASE, rollout=RolloutConfig(lanes=17)), "lanes 17 must be at most rollout.group 16"),
        (replace(BASE, rollout=RolloutConfig(packed_step=1.0)), "packed_step"),
        (replace(BASE, mesh=MeshConfig(data=-1, fsdp=-1)), "at most one"),
        (replace(BASE, mesh=MeshConfig(data=3), devices=8), "does not fit 8 devices"),
        (replace(BASE, mesh=MeshConfig(data=3, fsdp=1)), "micro_prompts 32 must be a multiple of mesh data x fsdp 3"),
    ],
)
def test_validate(recipe, words):
    with pytest.raises(ValueError, match=words):
        validate(recipe)


def test_validate_names_every_problem():
    with pytest.raises(ValueError, match="group 0.*keep_checkpoints 0"):
        validate(replace(BASE, rollout=RolloutConfig(group=0), grpo=GRPOConfig(keep_checkpoints=0)))
