"""Pictures: decoding of what people really send, slots in window order, and M-RoPE positions; against transformers where it counts."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pgjax.config import VisionConfig
from pgjax.data.images import image_grid, image_patches, load_image, slot_count, window_slots
from pgjax.data.positions import mrope_positions
from tests.golden import make_positions

VISION = VisionConfig(width=64, depth=2, heads=2, mlp=128, window=56, full_blocks=(1,))
GOLDEN = np.load(make_positions.FILE)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# --- decoding ---


def test_modes_become_rgb():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey, sixteen = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257)
    for image in (grey, sixteen):
        assert (np.asarray(load_image(encoded(image))) == ramp[..., None]).all()
    assert (np.asarray(load_image(encoded(grey.convert("P")))) == ramp[..., None]).all()
    assert load_image(encoded(noise(8, 9).convert("CMYK"), "JPEG")).mode == "RGB"
    assert (np.asarray(load_image(encoded(Image.new("1", (4, 4), 1)))) == 255).all()


def test_transparency_is_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 0)
    assert (np.asarray(load_image(encoded(clear))) == 255).all()
    assert abs(int(np.asarray(load_image(encoded(half)))[0, 0, 0]) - 127) <= 1
    assert (np.asarray(load_image(encoded(palette, transparency=0))) == 255).all()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[0] < 40 and upright.getpixel((10, 35))[0] > 215


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


def test_bombs_are_refused_before_they_are_unpacked():
    with pytest.raises(ValueError, match="12000 x 12000 pixels"):
        load_image(header(12000, 12000))
    with pytest.raises(ValueError, match="more than"):
        load_image(header(2**30, 2**30))
    with pytest.raises(ValueError, match="20 x 10 pixels, more than the 100"):
        load_image(encoded(noise(10, 20)), max_pixels=100)


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


@pytest.mark.parametrize(("height", "width"), [(56, 56), (112, 112), (70, 98), (84, 56), (112, 60), (30, 100), (150, 40)])
def test_slots_hold_the_patches_of_the_processor(height, width):
    from transformers import Qwen2VLImageProcessorPil

    image = noise(height, width)
    got = image_patches(image, VISION)
    want = Qwen2VLImageProcessorPil()(images=[image], return_tensors="np")
    assert got.grid == tuple(want["image_grid_thw"][0, 1:]) == image_grid(image.size, VISION)
    assert len(got.valid_I) == slot_count(got.grid, VISION) and got.valid_I.sum() == got.grid[0] * got.grid[1]
    assert (got.patches_IB[~got.valid_I] == 0).all() and got.patches_IB.dtype == np.float32
    # Token by token in raster order, four patches each: the processor's own order.
    slots = (got.slot_of_raster_token[:, None] * 4 + np.arange(4)).reshape(-1)
    np.testing.assert_array_equal(got.patches_IB[slots], want["pixel_values"])
    block = np.indices(got.grid).reshape(2, got.grid[0] // 2, 2, got.grid[1] // 2, 2).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    np.testing.assert_array_equal(got.yx_I2[slots], block)


def test_area_bounds():
    assert image_patches(noise(10, 10), VISION).grid == (4, 4)
    assert image_patches(noise(300, 200), VISION, max_pixels=112 * 112).grid == (8, 6)
    with pytest.raises(ValueError, match="aspect ratio"):
        image_patches(Image.new("RGB", (2010, 10)), VISION)


def test_a_window_fills_its_block():
    slot = window_slots((8, 6), VISION)  # two windows across, the right one half full
    assert set(slot[:4, :4].ravel()) == set(range(16)) and set(slot[4:, :4].ravel()) == set(range(32, 48))
    assert set(slot[:4, 4:].ravel()) < set(range(16, 32)) and slot_count((8, 6), VISION) == 64
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


# --- positions ---


def test_positions_are_those_of_transformers():
    for n in range(24):
        grids = [tuple(grid) for grid in GOLDEN[f"row{n}_grids"].tolist()]
        position_TX, delta = mrope_positions(GOLDEN[f"row{n}_is_image"], grids)
        np.testing.assert_array_equal(position_TX, GOLDEN[f"row{n}_position"])
        assert delta == GOLDEN[f"row{n}_delta"]


@pytest.mark.parity
def test_positions_are_those_of_transformers_live():
    pytest.importorskip("torch")
    drawn = make_positions.rows(60, seed=5)
    assert any(len(grids) == 2 for _, grids in drawn) and any(not grids for _, grids in drawn)
    for is_image_T, grids in drawn:
        want_TX, want_delta = make_positions.rope_index(is_image_T, grids)
        position_TX, delta = mrope_positions(is_image_T, grids)
        np.testing.assert_array_equal(position_TX, want_TX)
        assert delta == want_delta and position_TX.dtype == np.int32


def test_answers_continue_after_the_largest_position():
    is_image_T = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    position_TX, delta = mrope_positions(is_image_T, [(2, 3)])
    assert position_TX[2:8].tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    assert position_TX[8].tolist() == [5, 5, 5] and len(is_image_T) + delta == 6


@pytest.mark.parametrize("grids", [[], [(1, 2)], [(2, 2), (1, 1)], [(3, 2)]])
def test_marks_and_grids_must_agree(grids):
    with pytest.raises(ValueError, match="picture"):
        mrope_positions(np.array([0, 1, 1, 1, 1, 0], bool), grids)
