"""The shapes of the released models, for recipes and plans without their files. Sources: the checkpoints' config.json and
preprocessor_config.json; tests/test_released.py compares names, shapes and counts with transformers' own."""

from pgjax.config import ModelConfig, TextConfig, VisionConfig


def _qwen2_5(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab=152064, vision_mlp=3456, tied=False) -> ModelConfig:
    text = TextConfig(vocab, width, layers, heads, kv_heads, mlp=mlp, tied=tied)
    return ModelConfig("qwen2_5_vl", text, VisionConfig(mlp=vision_mlp, max_pixels=3584**2))


def _qwen3(width: int, layers: int, heads: int, mlp: int, tied: bool, small_tower: bool) -> ModelConfig:
    text = TextConfig(
        151936, width, layers, heads, 8, mlp=mlp, rope_theta=5e6, mrope_section=(24, 20, 20), tied=tied,
        qkv_bias=False, qk_norm=True, mrope_interleaved=True,
    )  # fmt: skip
    tower = dict(width=1024, depth=24, mlp=4096, deepstack=(5, 11, 17)) if small_tower else {}
    half = (0.5, 0.5, 0.5)
    rest = dict(width=1152, depth=27, mlp=4304, deepstack=(8, 16, 24), patch=16, window=0, full_blocks=(), positions=48)
    pictures = dict(mean=half, std=half, min_pixels=256**2, max_pixels=4096**2)
    return ModelConfig("qwen3_vl", text, VisionConfig(**rest | tower | pictures))


RELEASED = {
    "Qwen2.5-VL-3B": _qwen2_5(2048, 36, 16, 2, 11008, vocab=151936, vision_mlp=3420, tied=True),
    "Qwen2.5-VL-7B": _qwen2_5(3584, 28, 28, 4, 18944, vision_mlp=3420),
    "Qwen2.5-VL-32B": _qwen2_5(5120, 64, 40, 8, 27648),
    "Qwen2.5-VL-72B": _qwen2_5(8192, 80, 64, 8, 29568),
    "Qwen3-VL-2B": _qwen3(2048, 28, 16, 6144, tied=True, small_tower=True),
    "Qwen3-VL-4B": _qwen3(2560, 36, 32, 9728, tied=True, small_tower=True),
    "Qwen3-VL-8B": _qwen3(4096, 36, 32, 12288, tied=False, small_tower=False),
    "Qwen3-VL-32B": _qwen3(5120, 64, 64, 25600, tied=False, small_tower=False),
}
