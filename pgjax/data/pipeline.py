"""From examples to arrays: batch k is a function of (seed, k) alone.

One row: hide and shuffle categories (the OOD task), render policy and conversation, tokenize, place the visual tokens, lay out the
patches, pad to one shape. The state of the data is the integer k; there is nothing else to save.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import grain
import numpy as np

from pgjax.config import Recipe
from pgjax.conversation import Prompts, load_prompts, messages
from pgjax.data.images import MAX_PIXELS, MIN_PIXELS, ImagePatches, image_grid, image_patches, load_image, slot_count
from pgjax.data.positions import mrope_positions
from pgjax.data.schema import (
    CATEGORIES,
    CATEGORY_NODE,
    CATEGORY_OOD,
    LABELS,
    MODALITIES,
    Example,
    Gold,
    PromptBatch,
)
from pgjax.taxonomy import Level, PolicyView, Taxonomy, full_view, level_of, node_of_id, policy_view, render_policy

IMAGE_TOKEN = "<|image_pad|>"


class Batch(NamedTuple):
    prompt: PromptBatch  # numpy arrays
    gold: Gold  # numpy arrays
    rows: list[tuple[Example, PolicyView]]  # without the rows that only pad


@dataclass(frozen=True)
class Row:
    """One example as one prompt shows it."""

    index: int
    epoch: int
    example: Example
    view: PolicyView


class Pipeline:
    """Prompts of one split, padded to (T, I) = (data.prompt_tokens, data.patches).

    `examples` is any sequence of `Example`; rows of other splits are passed over. Training ("train") draws with a new order and
    new views each epoch, without end; any other split comes in order with one fixed view per example, and its last batch is filled
    up with rows of weight 0. `ids` is the automaton's id grid (axis K). With several processes each one makes its own slice of the
    global batch: rows [index * P / count, (index + 1) * P / count).

    Rows that cannot be shown whole are dropped here, never cut; `.dropped` counts them by reason: "prompt" (more than T tokens
    with the longest policy that may be drawn), "patches" (more than I slots), "image" (cannot be read), "reserved" (about a
    reserved node) and, in training, "never_seen" (about a category that training must not show). Raises ValueError when nothing is left.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        taxonomy: Taxonomy,
        tokenizer,
        recipe: Recipe,
        split: str,
        ids: tuple[str, ...],
        process_index: int = 0,
        process_count: int = 1,
        prompts: Prompts | None = None,
    ):
        self.taxonomy, self.tokenizer, self.recipe, self.split, self.ids = taxonomy, tokenizer, recipe, split, ids
        self.process_index, self.process_count = process_index, process_count
        self.prompts = prompts or load_prompts(recipe.data.prompts)
        self.image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # Nodes that no prompt may show: reserved ones, and the never-seen with all that is below them or has nothing left below.
        out = [taxonomy.nodes[n] for n in full_view(taxonomy, "leaf", recipe.data.ood.never_seen).hidden]
        self.reserved = {node.id for node in out if node.reserved}
        self.never_seen = {node.id for node in out if not node.reserved}
        self._examples = examples
        self.dropped: Counter[str] = Counter()
        if recipe.data.patches % recipe.model.vision.window_patches:
            raise ValueError(
                f"data.patches {recipe.data.patches} must be a multiple of the {recipe.model.vision.window_patches} patches of a window"
            )
        kept = self._fitting()
        if not kept:
            raise ValueError(f"no example of split {split!r} is left; dropped: {dict(self.dropped)}")
        self.kept = np.array(kept)
        data = grain.MapDataset.source(range(len(kept))).seed(recipe.seed)
        if split == "train":
            data = data.shuffle().repeat()
        data = data.map_with_index(lambda position, row: (int(kept[row]), position // len(kept)))
        self._rows = data.random_map(self._draw)

    def __len__(self) -> int:
        """Examples of this split, after dropping."""
        return len(self.kept)

    def batches(self, prompts: int) -> int:
        """Batches of `prompts` rows in one pass; the last may be padded (held-out splits only)."""
        return -(-len(self) // prompts)

    def batch(self, k: int, prompts: int | None = None) -> Batch:
        """Global batch `k` of P = `prompts` rows (default grpo.prompts), this process's slice of it.

        Arrays as in `PromptBatch` and `Gold`. Raises IndexError past the end of a held-out split.
        """
        prompts = prompts or self.recipe.grpo.prompts
        if prompts % self.process_count:
            raise ValueError(f"{prompts} prompts do not divide over {self.process_count} processes")
        if k < 0 or (self.split != "train" and k >= self.batches(prompts)):
            raise IndexError(f"split {self.split!r} has {self.batches(prompts)} batches of {prompts}, asked for number {k}")
        local = prompts // self.process_count
        first = k * prompts + self.process_index * local
        end = first + local if self.split == "train" else min(first + local, len(self))
        rows = [self._rows[position] for position in range(first, end)]
        # Filler must be a well-formed prompt; its weight is what makes it count for nothing.
        filled = rows + [rows[0] if rows else self._rows[0]] * (local - len(rows))
        return Batch(self._prompt_batch(filled), self._gold(filled, len(rows)), [(row.example, row.view) for row in rows])

    def _draw(self, drawn: tuple[int, int], rng: np.random.Generator) -> Row:
        index, epoch = drawn
        example, ood = self._examples[index], self.recipe.data.ood
        hide_gold = bool(rng.random() < ood.share)  # safe rows too, so that a gap in the policy does not betray the label
        return Row(index, epoch, example, policy_view(self.taxonomy, ood, rng, level_of(example.modality), example.node, hide_gold))

    def _longest_view(self, level: Level) -> PolicyView:
        """A view at least as long as any that may be drawn: lines are tokenized apart, so the longest ones make the longest policy."""
        full, keep = full_view(self.taxonomy, level, self.never_seen), self.recipe.data.ood.keep
        if keep is None:
            return full
        tokens = {entry: len(self._tokenize(self._policy(replace(full, entries=(entry,))))) for entry in full.entries}
        answerable = sorted((e for e in full.entries if e[0] in full.answerable), key=lambda entry: tokens[entry], reverse=True)
        others = sorted((e for e in full.entries if e[0] not in full.answerable), key=lambda entry: tokens[entry], reverse=True)
        # At leaf level every entry brings its category's line along, at worst a different one each.
        return replace(full, entries=(*answerable[: keep[1]], *others[: keep[1]]))

    def _fitting(self) -> list[int]:
        """Numbers of the examples of this split that can be shown whole; counts the others."""
        longest = {level: self._policy(self._longest_view(level)) for level in ("leaf", "top")}
        kept, waiting = [], []
        for index, example in enumerate(self._examples):
            if example.split != self.split:
                continue
            reason, visual = self._unfit(example)
            if reason:
                self.dropped[reason] += 1
            else:
                waiting.append((index, visual, self._text(example, longest[level_of(example.modality)])))
            if len(waiting) == 1024:  # tokenizing many at once is several times faster
                kept += self._short(waiting)
                waiting = []
        return kept + self._short(waiting)

    def _unfit(self, example: Example) -> tuple[str | None, int]:
        """Why an example cannot be shown, whatever the length of its prompt; and its visual tokens."""
        data, vision = self.recipe.data, self.recipe.model.vision
        nodes = {example.node, *example.accepted}
        if self.reserved & nodes:
            return "reserved", 0
        if self.split == "train" and self.never_seen & nodes:
            return "never_seen", 0
        try:
            grids = [image_grid(load_image(raw).size, vision, *self._area()) for raw in example.images]
        except ValueError:
            return "image", 0
        fits = sum(slot_count(grid, vision) for grid in grids) <= data.patches
        return None if fits else "patches", sum(height * width for height, width in grids) // vision.merge**2

    def _short(self, waiting: list[tuple[int, int, str]]) -> list[int]:
        """Numbers of those (number, visual tokens, text) that have at most T tokens."""
        kept = []
        tokens = self.tokenizer([text for _, _, text in waiting], add_special_tokens=False)["input_ids"] if waiting else []
        for (index, visual, _), ids in zip(waiting, tokens, strict=True):
            if len(ids) - ids.count(self.image_token) + visual <= self.recipe.data.prompt_tokens:
                kept.append(index)
            else:
                self.dropped["prompt"] += 1
        return kept

    def _policy(self, view: PolicyView) -> str:
        return render_policy(self.taxonomy, view, self.recipe.data.descriptions)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, example: Example, policy: str) -> str:
        chat = messages(example, policy, self.prompts, self.recipe.answer.think_tag)
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def _area(self) -> tuple[int, int]:
        """Bounds of a picture's area in pixels."""
        largest = self.recipe.data.max_pixels or MAX_PIXELS
        return min(MIN_PIXELS, largest), largest

    def _tokens(self, row: Row, images: list[ImagePatches]) -> list[int]:
        """Token ids of the prompt, every image placeholder repeated once per visual token."""
        counts = iter(len(image.slot_of_raster_token) for image in images)
        tokens: list[int] = []
        for token in self._tokenize(self._text(row.example, self._policy(row.view))):
            tokens += [token] * next(counts) if token == self.image_token else [token]
        return tokens

    def _prompt_batch(self, rows: list[Row]) -> PromptBatch:
        data, vision = self.recipe.data, self.recipe.model.vision
        P, T, I = len(rows), data.prompt_tokens, data.patches  # noqa: E741
        arrays: dict[str, Any] = dict(
            tokens_PT=np.zeros((P, T), np.int32),
            length_P=np.zeros(P, np.int32),
            position_PTX=np.zeros((P, T, 3), np.int32),
            delta_P=np.zeros(P, np.int32),
            visual_PT=np.full((P, T), -1, np.int32),
            patches_PIB=np.zeros((P, I, vision.channels * vision.temporal * vision.patch**2), np.float32),
            patch_yx_PI2=np.zeros((P, I, 2), np.int32),
            image_PI=np.full((P, I), -1, np.int32),
            id_P=np.array([(row.epoch * len(self._examples) + row.index) % 2**32 for row in rows], np.uint32),
        )
        batch = PromptBatch(**arrays)
        for p, row in enumerate(rows):
            images = [image_patches(load_image(raw), vision, *self._area()) for raw in row.example.images]
            tokens = np.array(self._tokens(row, images), np.int32)
            length = len(tokens)
            if length > T:
                raise ValueError(f"prompt of example {row.example.id} has {length} tokens, more than data.prompt_tokens {T}")
            batch.tokens_PT[p, :length], batch.length_P[p] = tokens, length
            merged_grids = [(image.grid[0] // vision.merge, image.grid[1] // vision.merge) for image in images]
            batch.position_PTX[p, :length], batch.delta_P[p] = mrope_positions(tokens == self.image_token, merged_grids)
            slot, merged = 0, []
            for number, image in enumerate(images):
                here = slice(slot, slot + len(image.valid_I))
                batch.patches_PIB[p, here], batch.patch_yx_PI2[p, here] = image.patches_IB, image.yx_I2
                batch.image_PI[p, here] = np.where(image.valid_I, number, -1)
                merged.append(slot // vision.merge**2 + image.slot_of_raster_token)
                slot = here.stop
            if merged:
                batch.visual_PT[p, np.flatnonzero(tokens == self.image_token)] = np.concatenate(merged)
        return batch

    def _gold(self, rows: list[Row], real: int) -> Gold:
        examples = [row.example for row in rows]
        code = lambda names, values: np.array([names.index(value) for value in values], np.int32)  # noqa: E731
        node_P = np.array([self._node(example, example.node) for example in examples], np.int32)
        category_P = code(CATEGORIES, [example.category for example in examples])
        accepted_PN = np.zeros((len(rows), len(self.taxonomy)), bool)
        for p, example in enumerate(examples):
            right = {self._node(example, id) for id in (example.node, *example.accepted)} - {-1}
            accepted_PN[p, list(right)] = True
            if category_P[p] == CATEGORY_NODE and right <= rows[p].view.hidden:
                category_P[p] = CATEGORY_OOD
        never_seen_P = np.isin(node_P, [self.taxonomy.index(id) for id in self.never_seen]) & (category_P == CATEGORY_OOD)
        arrays: dict[str, Any] = dict(
            modality_P=code(MODALITIES, [example.modality for example in examples]),
            request_P=code(LABELS, [example.request_label for example in examples]),
            response_P=code(LABELS, ["absent" if e.modality == "image" else e.response_label for e in examples]),
            category_P=category_P,
            node_P=node_P,
            node_of_id_PK=np.stack([node_of_id(row.view, self.ids) for row in rows]),
            accepted_PN=accepted_PN,
            never_seen_P=never_seen_P,
            weight_P=(np.arange(len(rows)) < real).astype(np.float32),
        )
        return Gold(**arrays)

    def _node(self, example: Example, id: str | None) -> int:
        """Canonical index of a gold id, -1 for None; text-image gold is a top-level category (PAPERS A4)."""
        if id is None:
            return -1
        parent = self.taxonomy.by_id(id).parent
        return self.taxonomy.index(parent if parent and level_of(example.modality) == "top" else id)
