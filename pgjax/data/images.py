"""Picture bytes to patches as the vision tower reads them: window-major slots, four neighbours to a visual token.

Resizing and normalising are those of transformers' Qwen2VLImageProcessorPil (the PIL backend is exact and needs no torch); the
order of patches is ours. That processor lists patches by merge block (2 x 2 patches), blocks in raster order. Here blocks come
window by window and every window takes `VisionConfig.window_patches` slots, so that windowed attention is attention inside
blocks of equal length; windows over the right and lower edge leave slots empty. A tower without windows has the processor's order.
"""

import functools
import io
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from pgjax.config import VisionConfig

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # few decoders, since files come from strangers
MAX_IMAGE_PIXELS = 64 * 2**20  # of the file as it is, before resizing; our choice
MAX_SCANS = 64  # of a progressive JPEG, which usually has about ten: each is decoded over the whole picture, whatever its size
MAX_FILE_BYTES = 256 * 2**20  # that many RGB pixels without compression, with some room


@dataclass(frozen=True)
class ImagePatches:
    """One picture in slots. I counts slots here: windows x window_patches."""

    patches_IB: np.ndarray  # float32 pixels of a patch, flattened as channel, frame, row, column; zero where empty
    yx_I2: np.ndarray  # int32 patch row and column; zero where empty
    valid_I: np.ndarray  # bool
    grid: tuple[int, int]  # patches per column and per row (height, width)
    slot_of_raster_token: np.ndarray  # int32: merged slot (slot // 4) of each visual token, tokens in raster order


class TooLarge(ValueError):
    """A picture of more pixels than MAX_IMAGE_PIXELS."""


def _decode(data: bytes, quick: bool) -> Image.Image:
    """Upright and whole, in the file's mode; `quick` takes a JPEG at an eighth of its size, for which all its bytes are read too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
            raise ValueError("too many scans")
        size = image.size
        if small := size[0] * size[1] <= MAX_IMAGE_PIXELS:
            if quick:
                image.draft(None, (1, 1))
            image.load()
            image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the image has more than the {MAX_IMAGE_PIXELS} pixels allowed; shrink it") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"not an image that is read here; give one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow has many ways to say that a file ends early or is broken: OSError, SyntaxError, TypeError, ...
        raise ValueError("the image is truncated or broken and cannot be decoded; give the whole file") from error
    if not small:
        raise TooLarge(f"the image has {size[0]} x {size[1]} pixels, more than the {MAX_IMAGE_PIXELS} allowed; shrink it")
    return image


def check_image(data: bytes) -> None:
    """ValueError as `load_image`, for a part of its time."""
    _decode(data, quick=True)


def load_image(data: bytes) -> Image.Image:
    """Decode a file to RGB: upright (EXIF), transparency on white, 16-bit scaled to 8, the first frame of several.

    Raises ValueError with the reason for what is no picture, cut off, or larger than MAX_IMAGE_PIXELS.
    """
    image = _decode(data, quick=False)
    if image.mode.startswith("I"):  # 16-bit grey; mode I has 32 bits, of which files use 8 or 16
        grey = np.asarray(image).astype(np.int64)
        eight = (grey if image.mode == "I" and grey.max() <= 255 else grey >> 8).clip(0, 255)
        image = Image.fromarray(np.where(grey == image.info.get("transparency"), 255, eight).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def plain(data: bytes) -> bytes:
    """The file, or where others might show another picture than `load_image` (several frames, transparency, turned by EXIF, neither RGB
    nor grey) a PNG of that one. ValueError as `load_image`."""
    image = load_image(data)
    with suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS) as file:  # what is broken behind the first frame is not plain
        several, turned = getattr(file, "n_frames", 1) > 1, file.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if file.mode in ("RGB", "L") and not (several or turned or "transparency" in file.info):
            return data
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def read_image(path: str | Path) -> bytes:
    """The bytes of a picture file, checked by decoding them once. ValueError names the file."""
    file = Path(path)
    try:
        if not file.is_file():  # a device or a pipe may never end
            raise ValueError("no such file; give the path of a picture")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB; shrink the image")
        data = file.read_bytes()
        load_image(data)
    except OSError as error:
        raise ValueError(f"image {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"image {path}: {error}") from error
    return data


def capped(vision: VisionConfig, max_pixels: int | None) -> VisionConfig:
    """The same tower for pictures of at most `max_pixels` after resizing; None, or more than the model takes, changes nothing."""
    largest = min(vision.max_pixels, max_pixels or vision.max_pixels)
    return replace(vision, min_pixels=min(vision.min_pixels, largest), max_pixels=largest)


@functools.cache
def image_processor(vision: VisionConfig):
    """transformers' processor with the settings of `vision`."""
    from transformers import Qwen2VLImageProcessorPil  # late: importing it takes a second

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels},
        image_mean=list(vision.mean),
        image_std=list(vision.std),
        patch_size=vision.patch,
        temporal_patch_size=vision.temporal,
        merge_size=vision.merge,
    )


def window_slots(grid: tuple[int, int], vision: VisionConfig) -> np.ndarray:
    """Slot [height, width] of every patch of a grid. Inside a window, merge blocks in raster order, then patches in raster order."""
    merge, side = vision.merge, vision.window_side
    if side % merge or vision.window % vision.patch:
        raise ValueError(f"window {vision.window} must hold whole merge blocks of {merge} patches of {vision.patch} pixels")
    y, x = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    window = (y // side) * -(-grid[1] // side) + x // side
    block = (y % side // merge) * (side // merge) + x % side // merge
    return ((window * (side // merge) ** 2 + block) * merge**2 + (y % merge) * merge + x % merge).astype(np.int32)


def image_grid(size: tuple[int, int], vision: VisionConfig) -> tuple[int, int]:
    """Patches (height, width) of a picture of `size` (width, height) pixels, without looking at it. ValueError beyond 200 : 1."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(size[1], size[0], vision.patch * vision.merge, vision.min_pixels, vision.max_pixels)
    return height // vision.patch, width // vision.patch


def slot_count(grid: tuple[int, int], vision: VisionConfig) -> int:
    """Slots that a grid of patches (height, width) takes, empty ones included."""
    side = vision.window_side
    return -(-grid[0] // side) * -(-grid[1] // side) * side**2


def shrunk(data: bytes, vision: VisionConfig, slots: int) -> bytes:
    """The file, or where its picture takes more than `slots` slots a PNG of a smaller copy. ValueError as `load_image`, and where even
    the smallest copy takes more."""
    image = load_image(data)
    scale, (width, height) = 1.0, image.size
    while slot_count(image_grid((width, height), vision), vision) > slots:
        before, scale = image_grid((width, height), vision), scale * 0.95
        width, height = (max(1, round(side * scale)) for side in image.size)
        if scale < 1e-3 or before == (2, 2):
            raise ValueError(f"the image does not fit into {slots} patches")
    if (width, height) == image.size:
        return data
    out = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def image_patches(image: Image.Image, vision: VisionConfig) -> ImagePatches:
    """Resize within the bounds on the area (pixels), normalise, cut into patches and lay them out in slots.

    Raises ValueError for a picture more than 200 times as long as wide.
    """
    features = image_processor(vision)(images=[image], return_tensors="np")
    _, height, width = (int(n) for n in features["image_grid_thw"][0])
    merge = vision.merge
    slot_yx = window_slots((height, width), vision)
    # The processor's rows are blocks in raster order; within a block, patches in raster order.
    block_major = lambda grid: grid.reshape(height // merge, merge, width // merge, merge).swapaxes(1, 2).reshape(-1)  # noqa: E731
    slot = block_major(slot_yx)
    slots = slot_count((height, width), vision)
    patches_IB = np.zeros((slots, features["pixel_values"].shape[1]), np.float32)
    patches_IB[slot] = features["pixel_values"]
    yx_I2 = np.zeros((slots, 2), np.int32)
    yx_I2[slot_yx.reshape(-1)] = np.indices((height, width)).reshape(2, -1).T
    valid_I = np.zeros(slots, bool)
    valid_I[slot] = True
    return ImagePatches(patches_IB, yx_I2, valid_I, (height, width), slot[:: merge**2] // merge**2)
