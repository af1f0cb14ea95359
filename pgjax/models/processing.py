"""How a released checkpoint wants its pictures: mean, std and bounds of the area, from the processor's file beside config.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pgjax.config import VisionConfig
from pgjax.files import read_json
from pgjax.recipes import typed

# What the files of the released checkpoints say, for a folder that has none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": dict(min_pixels=56**2, max_pixels=3584**2),
    "qwen3_vl": dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), min_pixels=256**2, max_pixels=4096**2),
}
RGB = tuple[float, float, float]
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}  # 3: bicubic


def processing_from_hf(folder: Path, family: str, vision: VisionConfig) -> VisionConfig:
    """`vision`, as config.json gives it, with mean, std, min_pixels and max_pixels of the checkpoint in `folder`.

    They stand in processor_config.json under image_processor (transformers 5), else in preprocessor_config.json; what the file leaves
    out is what transformers' own class has. Without a file they are those of the family's released checkpoints.

    Raises ValueError, naming file and keys, for what cannot be read, for a patch, merge or temporal size other than that of
    config.json, and for settings of steps that are always done here in one way.
    """
    from transformers import Qwen2VLImageProcessorPil  # late: importing it takes a second

    file, settings = _settings(folder)
    if settings is None:
        return replace(vision, **DEFAULTS[family])
    try:
        read = Qwen2VLImageProcessorPil.from_dict(settings)  # knows the old spellings too
        mean, std = (typed(RGB, getattr(read, key), key) for key in ("image_mean", "image_std"))
        least, most = (typed(int, getattr(read.size, key), f"size.{key}") for key in ("shortest_edge", "longest_edge"))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not the settings of Qwen's image processor: {error}") from error
    sizes = {"patch_size": vision.patch, "temporal_patch_size": vision.temporal, "merge_size": vision.merge}
    problems = [
        f"{key} {getattr(read, key)} {words} {value}"
        for words, wanted in (("is not supported, only", STEPS), ("must be that of config.json,", sizes))
        for key, value in wanted.items()
        if getattr(read, key) != value
    ]
    if not all(x > 0 for x in std):
        problems.append(f"image_std {std} must be above 0")
    if not 1 <= least <= most:
        problems.append(f"size.shortest_edge {least} and longest_edge {most} must be bounds of the area in pixels")
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    return replace(vision, mean=mean, std=std, min_pixels=least, max_pixels=most)


def _settings(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file with the image processor's settings, and these; None without such a file."""
    both, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if both.is_file() and "image_processor" in (settings := read_json(both)):
        return both, settings["image_processor"]
    return alone, read_json(alone) if alone.is_file() else None
