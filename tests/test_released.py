"""The released models by shapes alone: parameter counts, and every tensor's name and shape as transformers has them."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from pgjax.config import LOSS_PRESETS
from pgjax.data.schema import PromptBatch
from pgjax.generate.decode import encode, prefill
from pgjax.generate.law import Law
from pgjax.generate.score import Packed, score
from pgjax.models.checkpoint import canonical, tensor_shapes
from pgjax.models.hf_config import config_to_hf
from pgjax.models.qwen_vl import QwenVL, init_boxed, patch_values
from pgjax.models.released import RELEASED
from pgjax.recipes import load_recipe, validate

# The released files' parameters, as public code quotes them (of the 72B no quotation was found); a tied head is not counted twice.
PARAMETERS = {
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-32B": 33_452_718_336,
    "Qwen2.5-VL-72B": 73_410_777_344,
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
    "Qwen3-VL-32B": 33_357_390_064,
}


def abstract(name: str) -> dict:
    model = QwenVL(RELEASED[name])
    return nn.meta.unbox(jax.eval_shape(lambda key: init_boxed(model, key), jax.random.key(0)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(abstract(name))) == PARAMETERS[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", PARAMETERS)
def test_names_and_shapes_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config_to_hf(RELEASED[name], {})))
    shapes = {canonical(n): (p.shape[0], math.prod(p.shape[1:])) if p.ndim > 1 else tuple(p.shape) for n, p in theirs.named_parameters()}
    assert tensor_shapes(abstract(name)) == shapes


RECIPES = {f"proguard_{size}b": f"Qwen2.5-VL-{size}B" for size in (3, 7, 32, 72)} | {"proguard_qwen3vl_8b": "Qwen3-VL-8B"}


@pytest.mark.parametrize("name, model", RECIPES.items())
def test_recipes_of_released_models(name, model):
    """Their model is the released one, and their batches pass through the programs as shapes."""
    recipe = validate(load_recipe(name))
    assert recipe.model == RELEASED[model] and recipe.grpo.optimizer.learning_rate == 1e-6 and recipe.grpo.loss == LOSS_PRESETS["proguard"]
    P, T, I, G, R = 2, recipe.data.prompt_tokens, recipe.data.patches, recipe.rollout.group, recipe.answer.max_tokens
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    patches = jax.ShapeDtypeStruct((P, I, patch_values(recipe.model)), jnp.float32)
    batch = PromptBatch(ints(P, T), ints(P), ints(P, T, 3), ints(P), ints(P, T), patches, ints(P, I, 2), ints(P, I, 2), ints(P, I), ints(P))
    packed = Packed(ints(P, G * R), ints(P, G * R), ints(P, G * R), ints(P, G * R), G)
    law = Law(jax.ShapeDtypeStruct((recipe.model.text.vocab,), bool), None, None, R)
    net, params = QwenVL(recipe.model), abstract(model)
    logp, entropy = jax.eval_shape(lambda *args: score(net, *args), params, batch, packed, law)
    assert logp.shape == entropy.shape == (P, G * R) and logp.dtype == jnp.float32
    start = jax.eval_shape(lambda params, batch: prefill(net, params, batch, encode(net, params, batch)), params, batch)
    text = recipe.model.text
    assert start.prompt.k_LPKTC.shape == (text.layers, P, text.kv_heads, T, text.head_dim) and start.prompt.k_LPKTC.dtype == jnp.bfloat16
