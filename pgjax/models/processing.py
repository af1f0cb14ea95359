"""How a released checkpoint wants its pictures: mean, std and bounds of the area, from the processor's file beside config.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pgjax.config import VisionConfig
from pgjax.files import read_json

# What the files of the released checkpoints say, for a folder that has none.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": dict(min_pixels=56**2, max_pixels=3584**2),
    "qwen3_vl": dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), min_pixels=256**2, max_pixels=4096**2),
}
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
        found: dict[str, Any] = dict(
            mean=tuple(map(float, read.image_mean)),
            std=tuple(map(float, read.image_std)),
            min_pixels=int(read.size.shortest_edge or 0),
            max_pixels=int(read.size.longest_edge or 0),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not the settings of Qwen's image processor: {error}") from error
    sizes = {"patch_size": vision.patch, "temporal_patch_size": vision.temporal, "merge_size": vision.merge}
    differ = lambda wanted: [key for key, value in wanted.items() if getattr(read, key) != value]  # noqa: E731
    problems = [f"{key} {getattr(read, key)}, but config.json has {sizes[key]}" for key in differ(sizes)]
    problems += [f"{key} {getattr(read, key)} is not supported, only {STEPS[key]}" for key in differ(STEPS)]
    if len(found["mean"]) != 3 or len(found["std"]) != 3 or min(found["std"], default=0) <= 0:
        problems.append(f"image_mean {list(found['mean'])} and image_std {list(found['std'])} must be three numbers each, std above 0")
    if not 1 <= found["min_pixels"] <= found["max_pixels"]:
        problems.append(
            f"size.shortest_edge {found['min_pixels']} and longest_edge {found['max_pixels']} must be bounds of the area in pixels"
        )
    if problems:
        raise ValueError(f"{file}: " + "; ".join(problems))
    return replace(vision, **found)


def _settings(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file with the image processor's settings, and these; None without such a file."""
    both, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if both.is_file() and "image_processor" in (settings := read_json(both)):
        return both, settings["image_processor"]
    return alone, read_json(alone) if alone.is_file() else None
