"""Pictures: decoding of what people really send, resizing within bounds, slots in window order; against transformers where it counts."""

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pgjax.config import VisionConfig
from pgjax.data.images import MAX_SCANS, capped, image_grid, image_patches, load_image, plain, slot_count, window_slots
from tests.golden import make_positions

VISION = VisionConfig(width=64, depth=2, heads=2, mlp=128, window=56, full_blocks=(1,))
QWEN3 = VisionConfig(patch=16, window=0, full_blocks=(), mean=(0.5,) * 3, std=(0.5,) * 3, min_pixels=64 * 64, max_pixels=128 * 128)
GOLDEN = np.load(make_positions.FILE)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# --- decoding ---


def test_what_others_might_read_in_another_way_is_written_anew():
    image, other, turned = noise(8, 9), noise(8, 9, 1), Image.Exif()
    turned[0x112] = 6
    for same in (encoded(image), encoded(image, "JPEG"), encoded(image.convert("L"))):
        assert plain(same) is same
    frames = {"save_all": True, "append_images": [other]}
    for strange in (
        encoded(image.convert("RGBA")),
        encoded(image, transparency=(0, 0, 0)),
        encoded(image.convert("P")),
        encoded(image, "JPEG", exif=turned),
        *(encoded(image, kind, **frames) for kind in ("PNG", "GIF", "TIFF", "WEBP", "MPO")),
    ):
        made = Image.open(io.BytesIO(plain(strange)))
        assert (made.format, made.mode, made.n_frames) == ("PNG", "RGB", 1)
        assert made.tobytes() == load_image(strange).tobytes()
    with pytest.raises(ValueError, match="not an image"):
        plain(b"no picture")


def test_modes_become_rgb():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey, sixteen = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257)
    for image in (grey, sixteen):
        assert (np.asarray(load_image(encoded(image))) == ramp[..., None]).all()
    assert (np.asarray(load_image(encoded(grey.convert("P")))) == ramp[..., None]).all()
    assert load_image(encoded(noise(8, 9).convert("CMYK"), "JPEG")).mode == "RGB"
    assert (np.asarray(load_image(encoded(Image.new("1", (4, 4), 1)))) == 255).all()


def test_sixteen_bits_keep_the_upper_eight():
    dark = np.array([[0, 255, 256], [300, 511, 512]], np.uint16)  # a night sky is not made bright
    for image in (Image.fromarray(dark), Image.fromarray(dark.astype(">u2"))):
        for kind in ("PNG", "TIFF"):
            assert (np.asarray(load_image(encoded(image, kind))) == (dark >> 8)[..., None]).all()
    clear = encoded(Image.fromarray(dark), transparency=300)
    assert np.asarray(load_image(clear))[..., 0].tolist() == [[0, 0, 1], [255, 1, 2]]


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, of 2 (grey, alpha), 3 or 4 channels, which Pillow reads but does not write."""
    height, width, channels = values.shape
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    fields = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colours_lie_on_white(channels):
    values = np.random.default_rng(channels).integers(0, 2**16, (5, 4, channels))
    eight = (values >> 8).astype(float)
    colour, alpha = (eight, np.full((5, 4, 1), 255)) if channels == 3 else (eight[..., :-1], eight[..., -1:])
    want = colour * alpha / 255 + 255 * (1 - alpha / 255)
    assert np.abs(np.asarray(load_image(deep_png(values))) - want).max() <= 1


def test_palettes_are_looked_up():
    colours = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.frombytes("P", (16, 16), index.tobytes())
    image.putpalette(colours.tobytes())
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(np.asarray(load_image(encoded(image, kind))), colours[index])
    alpha = bytes(range(256))  # one for each colour
    want = 255 + (colours[index] - 255.0) * index[..., None] / 255
    assert np.abs(np.asarray(load_image(encoded(image, transparency=alpha))) - want).max() <= 1


def test_transparency_is_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    assert (np.asarray(load_image(encoded(clear))) == 255).all()
    assert abs(int(np.asarray(load_image(encoded(half)))[0, 0, 0]) - 127) <= 1
    assert (np.asarray(load_image(encoded(palette, transparency=0))) == 255).all()


# How the stored picture lies, and what makes it upright (Exif 2.3, tag 0x0112: where row 0 and column 0 are).
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    colour = noise(3, 5, orientation)
    for image in (colour, colour.convert("L"), colour.convert("P"), Image.fromarray(np.arange(15, dtype=np.uint16).reshape(3, 5) << 10)):
        stored = np.asarray(load_image(encoded(image)))
        for kind in ("PNG", "TIFF"):
            np.testing.assert_array_equal(np.asarray(load_image(encoded(image, kind, exif=exif))), UPRIGHT[orientation](stored))
    stored, turned = (np.asarray(load_image(encoded(colour, "JPEG", **options))) for options in ({}, {"exif": exif}))
    np.testing.assert_array_equal(turned, UPRIGHT[orientation](stored))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(kind):
    data = encoded(noise(64, 64), kind)
    with pytest.raises(ValueError, match="image"):
        load_image(data[: len(data) // 2])


def test_what_is_no_picture_is_refused():
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg/>"):
        with pytest.raises(ValueError, match="not an image|truncated"):
            load_image(data)


def header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields)) + b"\0\0\0\0IDAT"


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch):
    with pytest.raises(ValueError, match="12000 x 12000 pixels"):
        load_image(header(12000, 12000))
    with pytest.raises(ValueError, match="more than"):
        load_image(header(2**30, 2**30))
    monkeypatch.setattr("pgjax.data.images.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="20 x 10 pixels, more than the 100"):
        load_image(encoded(noise(10, 20)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's remarks on odd TIFF tags
def test_broken_files_end_in_a_picture_or_a_reason(kind):
    rng = np.random.default_rng(0)
    data = np.frombuffer(encoded(noise(16, 16), kind), np.uint8)
    for _ in range(100):
        broken = data.copy()
        broken[rng.integers(0, min(len(data), 300), 3)] = rng.integers(0, 256, 3)
        try:
            assert load_image(broken.tobytes()).mode == "RGB"
        except ValueError as error:
            assert "image" in str(error)


# --- slots ---


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), windows=st.booleans())
def test_slots_hold_the_patches_of_the_processor(height, width, windows):
    from transformers import Qwen2VLImageProcessorPil

    image, vision = noise(height, width), VISION if windows else QWEN3
    options = {} if windows else dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=64 * 64, max_pixels=128 * 128, patch_size=16)
    got = image_patches(image, vision)
    want = Qwen2VLImageProcessorPil(**options)(images=[image], return_tensors="np")
    assert got.grid == tuple(want["image_grid_thw"][0, 1:]) == image_grid(image.size, vision)
    assert len(got.valid_I) == slot_count(got.grid, vision) and got.valid_I.sum() == got.grid[0] * got.grid[1]
    assert (got.patches_IB[~got.valid_I] == 0).all() and got.patches_IB.dtype == np.float32
    # Token by token in raster order, four patches each: the processor's own order.
    slots = (got.slot_of_raster_token[:, None] * 4 + np.arange(4)).reshape(-1)
    np.testing.assert_array_equal(got.patches_IB[slots], want["pixel_values"])
    block = np.indices(got.grid).reshape(2, got.grid[0] // 2, 2, got.grid[1] // 2, 2).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    np.testing.assert_array_equal(got.yx_I2[slots], block)
    assert windows or slots.tolist() == list(range(len(got.valid_I))), "without windows the order is the processor's"


SMALL = VisionConfig(patch=2, window=8, min_pixels=8 * 8, max_pixels=16 * 16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))


def cut(image: Image.Image, vision: VisionConfig) -> np.ndarray:
    """Pixels [height, width, channel] as the model sees them, put together again from slots."""
    got, size = image_patches(image, vision), vision.patch
    out = np.full((got.grid[0] * size, got.grid[1] * size, 3), np.nan, np.float32)
    for patch, (y, x) in zip(got.patches_IB[got.valid_I], got.yx_I2[got.valid_I], strict=True):
        frames = patch.reshape(3, vision.temporal, size, size)
        assert (frames == frames[:, :1]).all(), "a still picture is the same in all frames"
        out[y * size : (y + 1) * size, x * size : (x + 1) * size] = frames[:, 0].transpose(1, 2, 0)
    return out


@pytest.mark.parametrize("window", [0, 8])
def test_pictures_at_and_beyond_the_bounds(window):
    vision = replace(SMALL, window=window)
    for side in (8, 12, 16):  # at the minimum, between, at the maximum: no pixel is resized
        image = noise(side, side)
        want = (np.asarray(image) / 255 - vision.mean) / vision.std
        np.testing.assert_allclose(cut(image, vision), want, rtol=0, atol=1e-6)
    for size, grid in {(20, 20): (8, 8), (40, 20): (4, 10), (4, 4): (4, 4), (1, 1): (4, 4), (8, 4): (4, 6)}.items():
        got = cut(Image.new("RGB", size, (51, 102, 204)), vision)
        assert got.shape == (2 * grid[0], 2 * grid[1], 3), f"{size[0]} x {size[1]} pixels"
        np.testing.assert_allclose(got, np.broadcast_to(np.array([0.2, 0.8, 4.0]), got.shape), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="aspect ratio"):
        image_patches(Image.new("RGB", (2010, 10)), vision)


def test_the_smaller_of_both_maxima_counts():
    image = noise(40, 40)
    for cap, grid in {None: (8, 8), 1000: (8, 8), 12 * 12: (6, 6), 4 * 4: (2, 2), 1: (2, 2)}.items():
        assert image_patches(image, capped(SMALL, cap)).grid == grid, f"capped at {cap} pixels"
    assert image_patches(noise(2, 2), capped(SMALL, 4 * 4)).grid == (2, 2), "the minimum gives way"


def test_a_window_fills_its_block():
    slot = window_slots((8, 6), VISION)  # two windows across, the right one half full
    assert set(slot[:4, :4].ravel()) == set(range(16)) and set(slot[4:, :4].ravel()) == set(range(32, 48))
    assert set(slot[:4, 4:].ravel()) < set(range(16, 32)) and slot_count((8, 6), VISION) == 64
    assert slot_count((4, 6), QWEN3) == 24
    with pytest.raises(ValueError, match="merge blocks"):
        window_slots((4, 4), VisionConfig(window=42))


def window_order(grid: tuple[int, int], window: int) -> np.ndarray:
    """Raster numbers of visual tokens in slot order."""
    slot = window_slots(grid, VisionConfig(window=window))
    return np.argsort(slot[::2, ::2].reshape(-1))


def test_window_order_is_that_of_transformers():
    for n, case in enumerate(make_positions.WINDOWED):
        np.testing.assert_array_equal(window_order(*case), GOLDEN[f"window{n}"])


@pytest.mark.parity
def test_window_order_is_that_of_transformers_live():
    pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    for h, w in rng.integers(1, 20, (30, 2)):
        case = ((2 * int(h), 2 * int(w)), int(rng.choice([56, 112, 168])))
        np.testing.assert_array_equal(window_order(*case), make_positions.window_index(*case))


def test_a_jpeg_of_endless_scans_is_refused():
    """Each scan is decoded over the whole picture, however few bytes it has."""
    out = io.BytesIO()
    Image.new("L", (64, 64)).save(out, "JPEG", progressive=True)
    assert load_image(out.getvalue()).size == (64, 64)
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_image(out.getvalue()[:-2] + b"\xff\xda" * (MAX_SCANS + 1) + b"\xff\xd9")
