"""Conversations as text, with their pictures, to arrays of one shape: visual tokens at the pads, patches in slots, M-RoPE positions."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgjax.config import VisionConfig
from pgjax.data.images import image_patches, load_image, slot_count
from pgjax.data.positions import mrope_positions
from pgjax.data.schema import PromptBatch
from pgjax.tokenizer import IMAGE_PAD


class TooLong(ValueError):
    """A prompt that does not fit; says how many tokens and slots of patches it takes."""

    def __init__(self, p: int, tokens: int, slots: int, T: int, I: int):
        super().__init__(f"prompt {p} has {tokens} tokens and {slots} slots of patches; data.prompt_tokens is {T}, data.patches {I}")
        self.tokens, self.slots = tokens, slots


class Prompt(NamedTuple):
    """One conversation, rendered by the chat template: one image pad for each picture, in order."""

    number: int  # names the prompt for randomness
    text: str
    images: Sequence[bytes]  # picture files


def lay_out(
    texts: Sequence[str], grids: Sequence[Sequence[tuple[int, int]]], tokenizer, vision: VisionConfig
) -> list[tuple[np.ndarray, int]]:
    """For each prompt its tokens, int32, a pad for every visual token, and the slots that its pictures' patches take.

    `grids` are those of each prompt's pictures (`image_grid`). Many texts at once are tokenized several times faster. ValueError for
    other numbers of pads than of pictures.
    """
    pad, rows = tokenizer.convert_tokens_to_ids(IMAGE_PAD), []
    ids_PT = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    for ids_T, own in zip(ids_PT, grids, strict=True):
        tokens_T = np.array(ids_T, np.int32)
        places = np.flatnonzero(tokens_T == pad)
        if len(places) != len(own):
            raise ValueError(f"{len(own)} pictures and {len(places)} places for them in a prompt; there must be as many {IMAGE_PAD}")
        copies_T = np.ones(len(tokens_T), int)
        copies_T[places] = [height * width // vision.merge**2 for height, width in own]
        rows.append((np.repeat(tokens_T, copies_T), sum(slot_count(grid, vision) for grid in own)))
    return rows


def prompt_batch(
    prompts: Sequence[Prompt],
    tokenizer,
    vision: VisionConfig,
    T: int,
    I: int,  # noqa: E741
    each: Callable[..., Iterable] = map,
) -> PromptBatch:
    """P prompts as numpy arrays, padded to T tokens and I slots for patches. `vision` has the bounds for resizing; `each` maps over the
    prompts' pictures, which take most of the time: that of a pool does several at once, to the same arrays.

    Raises TooLong for a prompt that does not fit, ValueError for a picture that cannot be read and for other numbers of pads than of
    pictures.
    """
    P, pad = len(prompts), tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    arrays: dict[str, Any] = dict(
        tokens_PT=np.zeros((P, T), np.int32),
        length_P=np.zeros(P, np.int32),
        position_PTX=np.zeros((P, T, 3), np.int32),
        delta_P=np.zeros(P, np.int32),
        visual_PT=np.full((P, T), -1, np.int32),
        patches_PIB=np.zeros((P, I, vision.channels * vision.temporal * vision.patch**2), np.float32),
        patch_yx_PI2=np.zeros((P, I, 2), np.int32),
        grid_PI2=np.zeros((P, I, 2), np.int32),
        image_PI=np.full((P, I), -1, np.int32),
        id_P=np.array([prompt.number % 2**32 for prompt in prompts], np.uint32),
    )
    batch = PromptBatch(**arrays)

    def pictures(p: int) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
        """Fills in the patches of a prompt as far as there is room; the grids of its pictures, and where their visual tokens are."""
        slot, grids, merged = 0, [], []
        for number, raw in enumerate(prompts[p].images):
            image = image_patches(load_image(raw), vision)
            here = slice(slot, slot + len(image.valid_I))
            if here.stop <= I:
                batch.patches_PIB[p, here], batch.patch_yx_PI2[p, here] = image.patches_IB, image.yx_I2
                batch.grid_PI2[p, here] = np.where(image.valid_I[:, None], image.grid, 0)
                batch.image_PI[p, here] = np.where(image.valid_I, number, -1)
            grids.append(image.grid)
            merged.append(slot // vision.merge**2 + image.slot_of_raster_token)
            slot = here.stop
        return grids, merged

    grids_P, merged_P = zip(*each(pictures, range(P)), strict=True)
    laid_P = lay_out([prompt.text for prompt in prompts], grids_P, tokenizer, vision)
    for p, ((tokens, slots), grids, merged) in enumerate(zip(laid_P, grids_P, merged_P, strict=True)):
        length = len(tokens)
        if length > T or slots > I:
            raise TooLong(p, length, slots, T, I)
        batch.tokens_PT[p, :length], batch.length_P[p] = tokens, length
        merged_grids = [(height // vision.merge, width // vision.merge) for height, width in grids]
        batch.position_PTX[p, :length], batch.delta_P[p] = mrope_positions(tokens == pad, merged_grids)
        if merged:
            batch.visual_PT[p, np.flatnonzero(tokens == pad)] = np.concatenate(merged)
    return batch
