"""Lessons as batches. Which lessons batch k holds and how they lie in it is known before the first step, as a function of the seed and
of the lessons' lengths alone: every process makes its own slice of the same batches, and a run that goes on needs no state but k.

Padding costs as much as text, so it is kept small twice. The prompts of a batch are of one bucket (data/buckets.py): padded to one of a
few shapes, chosen so that all lessons together are padded least. Their answers lie back to back, those of n prompts in one row, dealt out
so that rows are alike; a row has as many slots for answers as the fullest row of its bucket ever needs. So there is one program for a
bucket. (Of pictures in 150 to 768 tokens, with answers of 245 tokens on average and at most 768, four prompts a row in three buckets pad
about 28% of the slots; one prompt a row pads 46%, and one bucket 49%.)
"""

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgjax.config import Recipe
from pgjax.conversation import chat_text, neutralise_special
from pgjax.data.arrays import Prompt, lay_out, prompt_batch
from pgjax.data.buckets import bounds, cut, rounded, smallest
from pgjax.data.images import capped, image_grid, load_image, read_image
from pgjax.generate.score import answer_rows
from pgjax.parallel.mesh import WHOLE, Share
from pgjax.sft.step import Taught, taught
from pgjax.tokenizer import answer_ids

MULTIPLE = 8  # of which prompt lengths of buckets and row widths are multiples
SLOTS = 64  # of which their slots for patches are multiples, beside whole windows


@dataclass(frozen=True)
class Lesson:
    """A chat up to the model's turn, its pictures in order, and the answer to learn."""

    id: str
    group: str  # lessons of one group never part over splits
    messages: list[dict]  # as for chat templates, with a part for each picture
    images: tuple[Path, ...]
    answer: str


class Laid(NamedTuple):
    """A lesson as text and tokens, and what it takes."""

    prompt: str
    images: tuple[Path, ...]
    answer: list[int]
    tokens: int  # of the prompt
    slots: int  # for patches
    patches: int


class Batch(NamedTuple):
    taught: Taught  # this process's rows, numpy
    width: int  # Q
    counts: dict[str, int]  # of the whole batch: tokens of prompts and of answers, patches, and slots of rows


class Lessons:
    """Lessons of one split as batches; with several processes each makes its share of them.

    Training draws a new order each epoch, for sft.steps batches of sft.prompts; the last lessons of an order, which fill no batch, are
    left out of that epoch, and a split smaller than a batch repeats some. Held-out lessons come once each, in batches of
    sft.micro_prompts; the last is filled up with rows that have no answer.

    Lessons that cannot be shown whole are dropped, never cut: `dropped` counts them by reason (see `unfit`). To find out, every picture
    is decoded. ValueError when nothing is left, and for a picture that cannot be read. `shards` of the mesh (data x fsdp) have one row
    of a micro-batch each.
    """

    def __init__(self, lessons: Sequence[Lesson], tokenizer, recipe: Recipe, shards: int, training: bool, share: Share = WHOLE):
        self._tokenizer, self._recipe, self._share = tokenizer, recipe, share
        laid = lay_out_lessons(lessons, tokenizer, recipe)
        reasons = [unfit(lesson, recipe) for lesson in laid]
        self.dropped = Counter(filter(None, reasons))
        self.kept = [lesson for lesson, reason in zip(laid, reasons, strict=True) if not reason]
        if not self.kept:
            what = f"no lesson {'to train on' if training else 'held out'} is left; dropped: {dict(self.dropped)}"
            raise ValueError(f"{what}; larger data.prompt_tokens, data.patches and answer.max_tokens take more")
        sizes = np.array([(lesson.tokens, len(lesson.answer), lesson.patches) for lesson in self.kept])
        self._size_N = dict(zip(("prompt", "answer", "patches"), sizes.T, strict=True))
        sft, self.per_row = recipe.sft, recipe.sft.micro_prompts // shards
        steps, most = (MULTIPLE, math.lcm(SLOTS, recipe.model.vision.window_patches)), (recipe.data.prompt_tokens, recipe.data.patches)
        need_N2 = rounded(np.array([(lesson.tokens, lesson.slots) for lesson in self.kept]), steps, most)
        self.bounds = bounds(need_N2, sft.buckets)
        bucket_N = smallest(need_N2, self.bounds)
        if training:
            rows_KP, self.bucket_K = drawn(bucket_N, self.bounds, sft.prompts, sft.steps, recipe.seed)
        else:
            rows_KP, self.bucket_K = cut(bucket_N, self.bounds, sft.micro_prompts)
        self.rows_KP = np.take_along_axis(rows_KP, dealt(of(self._size_N["answer"], rows_KP), self.per_row), axis=1)
        fullest_K = of(self._size_N["answer"], self.rows_KP).reshape(len(rows_KP), -1, self.per_row).sum(axis=2).max(axis=1)
        self.widths = {int(bucket): int(up(fullest_K[self.bucket_K == bucket].max())) for bucket in np.unique(self.bucket_K)}

    def __len__(self) -> int:
        """Batches."""
        return len(self.rows_KP)

    def shapes(self) -> list[tuple[int, int, int]]:
        """Of each bucket that occurs the slots of a prompt, of its patches and of the answers in a row."""
        return [(*self.bounds[bucket].tolist(), width) for bucket, width in self.widths.items()]

    def batch(self, k: int) -> Batch:
        rows_P, (T, I), width = self.rows_KP[k], self.bounds[self.bucket_K[k]], self.widths[self.bucket_K[k]]  # noqa: E741
        counts = {name: int(of(size_N, rows_P).sum()) for name, size_N in self._size_N.items()}
        counts["slots"] = len(rows_P) * int(T) + len(rows_P) // self.per_row * width
        own = [(int(n), self.kept[n if n >= 0 else rows_P.max()]) for n in self._share.of(rows_P)]
        prompts = [Prompt(n, lesson.prompt, [read_again(path) for path in lesson.images]) for n, lesson in own]
        vision = capped(self._recipe.model.vision, self._recipe.data.max_pixels)
        prompt = prompt_batch(prompts, self._tokenizer, vision, T, I)
        answers = answer_rows([[lesson.answer if n >= 0 else []] for n, lesson in own], self._recipe.answer.max_tokens)
        return Batch(taught(prompt, *answers), width, counts)


def lay_out_lessons(lessons: Sequence[Lesson], tokenizer, recipe: Recipe) -> list[Laid]:
    """Tokenised, all at once. Answers end with the stop token, and with nothing else that is special: what looks like it in their text is
    broken, as it is in prompts. ValueError for a picture that cannot be read."""
    vision = capped(recipe.model.vision, recipe.data.max_pixels)

    def grid(path: Path) -> tuple[int, int]:
        return image_grid(load_image(read_image(path)).size, vision)

    paths = list({path for lesson in lessons for path in lesson.images})
    with ThreadPoolExecutor() as pool:
        grids = dict(zip(paths, pool.map(grid, paths), strict=True))
    own = [[grids[path] for path in lesson.images] for lesson in lessons]
    texts = [chat_text(lesson.messages, tokenizer) for lesson in lessons]
    prompts = lay_out(texts, own, tokenizer, vision)
    answers = answer_ids(tokenizer, [neutralise_special(lesson.answer, tokenizer) for lesson in lessons])
    rows = zip(lessons, texts, prompts, answers, own, strict=True)
    area = lambda sizes: sum(height * width for height, width in sizes)  # noqa: E731
    return [Laid(text, lesson.images, answer, len(tokens), slots, area(sizes)) for lesson, text, (tokens, slots), answer, sizes in rows]


def read_again(path: Path) -> bytes:
    """A picture that was there when lessons were laid out. ValueError where it no longer is."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"image {path} cannot be read any more: {error.strerror}; put it back, and the run goes on") from error


def unfit(lesson: Laid, recipe: Recipe) -> str | None:
    """Why a lesson cannot be shown whole; None where it can."""
    if lesson.slots > recipe.data.patches:
        return "patches"
    if lesson.tokens > recipe.data.prompt_tokens:
        return "prompt"
    return "answer" if len(lesson.answer) > recipe.answer.max_tokens else None


def up(size):
    """The next multiple."""
    return -(-size // MULTIPLE) * MULTIPLE


def drawn(bucket_N: np.ndarray, bound_BD: np.ndarray, prompts: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the batches of training, [K, P], and their buckets [K]: in each epoch a new order of lessons, then of batches."""
    epochs, per_epoch = [], max(len(bucket_N) // prompts, 1)
    for epoch in range(-(-steps // per_epoch)):
        rng = np.random.default_rng((seed, epoch))
        order_N = np.resize(rng.permutation(len(bucket_N)), per_epoch * prompts)  # cut off, or repeated
        place_KP, bucket_K = cut(bucket_N[order_N], bound_BD, prompts)
        order_K = rng.permutation(per_epoch)
        epochs.append((order_N[place_KP[order_K]], bucket_K[order_K]))
    rows_KP, bucket_K = map(np.concatenate, zip(*epochs, strict=True))
    return rows_KP[:steps], bucket_K[:steps]


def of(value_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A size of each row; 0 where there is none."""
    return np.where(rows >= 0, value_N[rows], 0)


def dealt(size_KP: np.ndarray, per_row: int) -> np.ndarray:
    """Order [K, P] of each batch in which every `per_row` that follow each other are about as large together: the largest are dealt out
    to the rows, the next largest in turn from the last row to the first, and so on."""
    order = np.argsort(-size_KP, axis=1, kind="stable").reshape(len(size_KP), per_row, -1)
    order[:, 1::2] = order[:, 1::2, ::-1]
    return order.swapaxes(1, 2).reshape(size_KP.shape)
