"""Where visual tokens stand and what positions they have: golden vectors, and transformers itself on random conversations."""

import functools
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from pgjax.config import VisionConfig
from pgjax.data.arrays import Prompt, prompt_batch
from pgjax.data.images import image_processor
from pgjax.data.positions import mrope_positions
from pgjax.tokenizer import train_byte_bpe
from tests.golden import make_positions

GOLDEN = np.load(make_positions.FILE)

# --- positions of marked tokens ---


def test_positions_are_those_of_transformers():
    for n in range(24):
        grids = [tuple(grid) for grid in GOLDEN[f"row{n}_grids"].tolist()]
        position_TX, delta = mrope_positions(GOLDEN[f"row{n}_is_image"], grids)
        np.testing.assert_array_equal(position_TX, GOLDEN[f"row{n}_position"])
        assert delta == GOLDEN[f"row{n}_delta"]


def test_answers_continue_after_the_largest_position():
    is_image_T = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    position_TX, delta = mrope_positions(is_image_T, [(2, 3)])
    assert position_TX[2:8].tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    assert position_TX[8].tolist() == [5, 5, 5] and len(is_image_T) + delta == 6


@pytest.mark.parametrize("grids", [[], [(1, 2)], [(2, 2), (1, 1)], [(3, 2)]])
def test_marks_and_grids_must_agree(grids):
    with pytest.raises(ValueError, match="picture"):
        mrope_positions(np.array([0, 1, 1, 1, 1, 0], bool), grids)


# --- whole conversations ---

TOWERS = {
    "qwen2_5_vl": VisionConfig(window=56, min_pixels=56 * 56, max_pixels=112 * 112),
    "qwen3_vl": VisionConfig(patch=16, window=0, mean=(0.5,) * 3, std=(0.5,) * 3, min_pixels=64 * 64, max_pixels=128 * 128),
}
CLASSES = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
TEXTS = ("", "A brass vault.", "Where is it?\n\n", "Two   pictures: ", "\u00e9\u4e2d\U0001f511", "1234 <image> 5")


@functools.cache
def tokenizer():
    return train_byte_bpe(TEXTS * 4, 320)


@functools.cache
def processor(family: str):
    """transformers' processor without the one for video, which needs torchvision."""
    vision, words = TOWERS[family], tokenizer()

    class Images(CLASSES[family]):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, words):
            for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
                token = f"<|{name}|>"
                setattr(self, name.removesuffix("_pad") + "_token", token)
                setattr(self, name.removesuffix("_pad") + "_token_id", words.convert_tokens_to_ids(token))
            ProcessorMixin.__init__(self, image_processor, words)

    return Images(image_processor(vision), words)


@st.composite
def conversations(draw) -> tuple[str, list[Image.Image]]:
    """Runs of text and up to four pictures in any order, in one to three turns; as the chat template writes them, and the pictures."""
    parts = draw(st.permutations([st.none()] * draw(st.integers(0, 4)) + [st.sampled_from(TEXTS)] * draw(st.integers(0, 4))))
    content, images = [], []
    for part in parts:
        if (text := draw(part)) is None:
            width, height = draw(st.integers(1, 160)), draw(st.integers(1, 160))
            pixels = np.random.default_rng(width * 200 + height).integers(0, 256, (height, width, 3), np.uint8)
            images.append(Image.fromarray(pixels))
        content.append({"type": "image"} if text is None else {"type": "text", "text": text})
    ends = sorted(draw(st.lists(st.integers(0, len(content)), max_size=2)))
    turns = [{"role": "user", "content": content[a:b]} for a, b in zip([0, *ends], [*ends, len(content)], strict=True)]
    return tokenizer().apply_chat_template(turns, add_generation_prompt=draw(st.booleans()), tokenize=False), images


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


T, I = 640, 1024  # a strip of 160 : 1 takes 208 slots


def ours_and_theirs(family: str, drawn: list[tuple[str, list[Image.Image]]]):
    """Our batch, and for each of its rows what transformers makes of it alone."""
    prompts = [Prompt(number, text, [png(image) for image in images]) for number, (text, images) in enumerate(drawn)]
    batch = prompt_batch(prompts, tokenizer(), TOWERS[family], T, I)
    options = dict(return_tensors="np", return_mm_token_type_ids=True, add_special_tokens=False)
    return batch, [processor(family)(text=[text], images=images or None, **options) for text, images in drawn]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", TOWERS)
def test_conversations_are_processed_as_by_transformers(family, data):
    vision = TOWERS[family]
    batch, theirs = ours_and_theirs(family, data.draw(st.lists(conversations(), min_size=1, max_size=2)))
    for p, their in enumerate(theirs):
        length = batch.length_P[p]
        np.testing.assert_array_equal(batch.tokens_PT[p, :length], their["input_ids"][0])
        assert (batch.tokens_PT[p, length:] == 0).all() and (batch.visual_PT[p, length:] == -1).all()
        visual_T = batch.visual_PT[p, :length]
        np.testing.assert_array_equal(visual_T >= 0, their["mm_token_type_ids"][0] == 1)
        slots = (visual_T[visual_T >= 0][:, None] * vision.merge**2 + np.arange(vision.merge**2)).reshape(-1)
        grids = their["image_grid_thw"][:, 1:] if "image_grid_thw" in their else np.zeros((0, 2), int)
        owner = np.repeat(np.arange(len(grids)), grids.prod(1))
        if len(grids):
            np.testing.assert_array_equal(batch.patches_PIB[p, slots], their["pixel_values"])
        np.testing.assert_array_equal(batch.image_PI[p, slots], owner)
        np.testing.assert_array_equal(batch.grid_PI2[p, slots], grids[owner])
        assert (batch.patch_yx_PI2[p] <= np.maximum(batch.grid_PI2[p] - 1, 0)).all()
        empty = np.setdiff1d(np.arange(I), slots)
        assert (batch.image_PI[p, empty] == -1).all() and not batch.grid_PI2[p, empty].any() and not batch.patches_PIB[p, empty].any()


@pytest.mark.parity
@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", TOWERS)
def test_positions_are_those_of_transformers_live(family, data):
    torch = pytest.importorskip("torch")
    batch, theirs = ours_and_theirs(family, [data.draw(conversations())])
    length = batch.length_P[0]
    (their,) = theirs
    grids = torch.tensor(their["image_grid_thw"]) if "image_grid_thw" in their else None
    types = torch.tensor(their["mm_token_type_ids"])
    position, delta = make_positions.rope_index(torch.tensor(their["input_ids"]), types, grids, family)
    np.testing.assert_array_equal(batch.position_PTX[0, :length], position)
    assert batch.delta_P[0] == delta and not batch.position_PTX[0, length:].any()


def test_pads_and_pictures_must_agree_and_fit():
    vision, text = TOWERS["qwen3_vl"], "<|vision_start|><|image_pad|><|vision_end|>"
    raw = png(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="2 pictures and 1 places"):
        prompt_batch([Prompt(0, text, [raw, raw])], tokenizer(), vision, T, I)
    with pytest.raises(ValueError, match="0 pictures and 1 places"):
        prompt_batch([Prompt(0, text, [])], tokenizer(), vision, T, I)
    assert prompt_batch([Prompt(0, text, [raw])], tokenizer(), vision, 6, 16).length_P == 6
    for tokens, patches in ((5, 16), (6, 12)):
        with pytest.raises(ValueError, match="6 tokens and 16 slots"):
            prompt_batch([Prompt(0, text, [raw])], tokenizer(), vision, tokens, patches)
