"""What a checkpoint's processor files say about pictures: old and new spellings, both places, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from pgjax.config import VisionConfig
from pgjax.data.images import image_patches, image_processor
from pgjax.models.processing import processing_from_hf

TOWER = VisionConfig(patch=16, window=0, full_blocks=(), min_pixels=1, max_pixels=2)  # as config.json gives it: bounds are not there
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5, 0.25, 0.5], "patch_size": 16}
BOUNDS = {"shortest_edge": 4096, "longest_edge": 16384}
READ = replace(TOWER, mean=(0.5,) * 3, std=(0.5, 0.25, 0.5), min_pixels=4096, max_pixels=16384)


def write(folder, name="preprocessor_config", **settings):
    (folder / f"{name}.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": BOUNDS},
        {"min_pixels": 4096, "max_pixels": 16384},
        {"min_pixels": 4096, "max_pixels": 16384, "size": {"min_pixels": 1, "max_pixels": 2}},
        {"size": {"shortest_edge": 1, "longest_edge": 16384}, "min_pixels": 4096, "image_processor_type": "Qwen2VLImageProcessorFast"},
        {"size": BOUNDS, "resample": 3, "rescale_factor": 0.00392156862745098, "merge_size": 2, "temporal_patch_size": 2},
    ],
)
def test_spellings_of_the_bounds(tmp_path, settings):
    write(tmp_path, **HALF, **settings)
    assert processing_from_hf(tmp_path, "qwen3_vl", TOWER) == READ
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8))
    want = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[picture], return_tensors="np")
    np.testing.assert_array_equal(image_patches(picture, READ).patches_IB, want["pixel_values"])


def test_the_newer_file_goes_first(tmp_path):
    write(tmp_path, **HALF, size={"shortest_edge": 7, "longest_edge": 8})
    write(tmp_path, "processor_config", processor_class="Qwen3VLProcessor")
    assert processing_from_hf(tmp_path, "qwen3_vl", TOWER).max_pixels == 8
    write(tmp_path, "processor_config", image_processor=HALF | {"size": BOUNDS})
    assert processing_from_hf(tmp_path, "qwen3_vl", TOWER) == READ
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size.longest_edge == READ.max_pixels


def test_what_a_file_leaves_out_is_the_default_of_transformers(tmp_path):
    write(tmp_path, patch_size=16)
    default, got = Qwen2VLImageProcessorPil(), processing_from_hf(tmp_path, "qwen3_vl", TOWER)
    assert (got.mean, got.std) == (tuple(default.image_mean), tuple(default.image_std))
    assert (got.min_pixels, got.max_pixels) == (default.size.shortest_edge, default.size.longest_edge)


def test_without_a_file_the_family_has_its_own(tmp_path):
    qwen3 = processing_from_hf(tmp_path, "qwen3_vl", TOWER)
    assert qwen3 == replace(TOWER, mean=(0.5,) * 3, std=(0.5,) * 3, min_pixels=65536, max_pixels=16777216)
    assert processing_from_hf(tmp_path, "qwen2_5_vl", VisionConfig()) == replace(VisionConfig(), min_pixels=3136, max_pixels=12845056)


def test_what_is_written_is_read_again(tmp_path):
    image_processor(READ).save_pretrained(tmp_path)
    assert processing_from_hf(tmp_path, "qwen3_vl", TOWER) == READ


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"patch_size": 14}, "patch_size 14 must be that of config.json, 16"),
        ({"merge_size": 4, "temporal_patch_size": 1}, "temporal_patch_size 1.*merge_size 4 must be that of config.json, 2"),
        ({"resample": 2}, "resample 2 is not supported, only 3"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"image_mean": [0.5]}, r"image_mean: \(0.5,\) is not tuple\[float, float, float\]"),
        ({"image_mean": ["0.5"] * 3}, r"image_mean\[0\]: '0.5' is not float"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std \(0.5, 0.5, 0.0\) must be above 0"),
        ({"image_mean": 0.5}, "not the settings.*image_mean: 0.5"),
        ({"max_pixels": "many"}, "not the settings"),
        ({"size": {"height": 224, "width": 224}}, "size.shortest_edge: None is not int"),
        ({"size": {"shortest_edge": 9, "longest_edge": 8}}, "shortest_edge 9 and longest_edge 8"),
    ],
)
def test_what_is_refused_is_named(tmp_path, settings, words):
    write(tmp_path, **HALF | {"size": BOUNDS} | settings)
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*{words}") as error:
        processing_from_hf(tmp_path, "qwen3_vl", TOWER)
    assert "\n" not in str(error.value)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size":')
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        processing_from_hf(tmp_path, "qwen3_vl", TOWER)
