"""From examples to arrays: batch k is a function of (seed, k) alone.

One row: hide and shuffle categories (the OOD task), render policy and conversation; arrays.py makes the arrays. The state of the
data is the integer k; there is nothing else to save.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from pgjax.config import Recipe
from pgjax.conversation import Prompts, load_prompts, messages
from pgjax.data.arrays import Prompt, lay_out, prompt_batch
from pgjax.data.buckets import bounds, cut, padding, rounded, smallest
from pgjax.data.images import capped, image_grid, load_image
from pgjax.data.schema import (
    CATEGORIES,
    CATEGORY_NODE,
    CATEGORY_OOD,
    EVALUATION_ONLY,
    LABELS,
    MODALITIES,
    Example,
    Gold,
    PromptBatch,
)
from pgjax.files import replace_file
from pgjax.parallel.mesh import WHOLE, Share
from pgjax.taxonomy import Level, PolicyView, Taxonomy, full_view, level_of, node_of_id, policy_view, render_policy

TOKENS, SLOTS = 64, 64  # of which the sizes of buckets are multiples, beside whole windows


class Batch(NamedTuple):
    prompt: PromptBatch  # numpy arrays
    gold: Gold  # numpy arrays
    rows: list[tuple[Example, PolicyView]]  # without the rows that only pad


@dataclass(frozen=True)
class Row:
    """One example as one prompt shows it."""

    number: int  # names the prompt for randomness
    example: Example
    view: PolicyView


class Renderer:
    """Conversations as text and as gold. `ids` is the automaton's id grid (axis K)."""

    def __init__(self, taxonomy: Taxonomy, tokenizer, recipe: Recipe, ids: tuple[str, ...], prompts: Prompts | None = None):
        self.taxonomy, self.tokenizer, self.recipe, self.ids = taxonomy, tokenizer, recipe, ids
        self.prompts = prompts or load_prompts(recipe.data.prompts)
        self.vision = capped(recipe.model.vision, recipe.data.max_pixels)
        # Nodes that no prompt may show: reserved ones, and the never-seen with all that is below them or has nothing left below.
        out = [taxonomy.nodes[n] for n in full_view(taxonomy, "leaf", recipe.data.ood.never_seen).hidden]
        self.reserved = {node.id for node in out if node.reserved}
        self.never_seen = {node.id for node in out if not node.reserved}

    def prompt(self, example: Example, view: PolicyView, opening: str, tokens: int) -> PromptBatch:
        """A batch of one row of T = `tokens`; the answer begins with `opening`. Errors as `prompt_batch`."""
        prompt = Prompt(0, self._text(example, self._policy(view)) + opening, example.images)
        return prompt_batch([prompt], self.tokenizer, self.vision, tokens, self.recipe.data.patches)

    def gold(self, rows: Sequence[tuple[Example, PolicyView]]) -> Gold:
        """What is known of the rows, as numpy arrays."""
        return self._gold([Row(number, *row) for number, row in enumerate(rows)], len(rows))

    def _policy(self, view: PolicyView) -> str:
        return render_policy(self.taxonomy, view, self.recipe.data.descriptions)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, example: Example, policy: str) -> str:
        chat = messages(example, policy, self.prompts, self.recipe.answer.think_tag)
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def _prompt(self, row: Row) -> Prompt:
        return Prompt(row.number, self._text(row.example, self._policy(row.view)), row.example.images)

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


class Pipeline(Renderer):
    """Prompts of one split, each batch padded to the (T, I) of one bucket: `bounds` has them, at most `data.buckets`, chosen from what the
    rows take so that least is padded (data/buckets.py). With one bucket it is (data.prompt_tokens, data.patches).

    `examples` is any sequence of `Example`; rows of other splits are passed over. Training ("train") draws a stream with a new order and
    new views each epoch, without end. As many rows of it as make whole batches of an epoch are cut into batches, each of one bucket
    but for what a bucket has left over; batches come in the order of their first rows. Any other split comes bucket by bucket, in order,
    with one fixed view per example, and its last batch is filled up with rows of weight 0. With several processes each one makes its
    own slice of the global batch: rows [index * P / count, (index + 1) * P / count). `data.workers` threads prepare rows.

    Rows that cannot be shown whole are dropped here, never cut; `.dropped` counts them by reason: "prompt" (more than T tokens
    with the longest policy that may be drawn), "patches" (more than I slots), "image" (cannot be read), "reserved" (about a
    reserved node) and, in training, "never_seen" (about a category that training must not show). To find out, every picture is
    decoded; the file `cache` keeps what was found, for the next start with the same recipe, tokenizer and rows.

    Raises ValueError when nothing is left, and for a training row of a source that is for evaluation only.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        taxonomy: Taxonomy,
        tokenizer,
        recipe: Recipe,
        split: str,
        ids: tuple[str, ...],
        share: Share = WHOLE,
        prompts: Prompts | None = None,
        cache: Path | None = None,
    ):
        super().__init__(taxonomy, tokenizer, recipe, ids, prompts)
        self.split, self.share = split, share
        self._examples = examples
        self.dropped: Counter[str] = Counter()
        self._each = ThreadPoolExecutor(recipe.data.workers, "rows").map if recipe.data.workers > 1 else map
        fitting = self._fitting() if cache is None else self._remembered(cache)
        if not fitting:
            what = f"no example of split {split!r} is left; dropped: {dict(self.dropped)}"
            raise ValueError(f"{what}; larger data.prompt_tokens or data.patches show more")
        self.kept, self.sizes = np.array(list(fitting)), np.array(list(fitting.values()))  # [N], [N, 2]
        self.bounds = np.array([(recipe.data.prompt_tokens, recipe.data.patches)])
        if recipe.data.buckets > 1:
            steps = TOKENS, math.lcm(SLOTS, self.vision.window_patches)
            self.bounds = bounds(rounded(self.sizes, steps, self.bounds[0]), recipe.data.buckets)
        self.buckets = smallest(self.sizes, self.bounds)  # [N]
        data = grain.MapDataset.source(range(len(self.kept))).seed(recipe.seed)
        if split == "train":
            data = data.shuffle().repeat()
        self._order = data
        data = data.map_with_index(lambda position, row: (int(self.kept[row]), position // len(self.kept)))
        self._rows = data.random_map(self._draw)
        self._cut = lru_cache(2)(self._window)

    def __len__(self) -> int:
        """Examples of this split, after dropping."""
        return len(self.kept)

    def batches(self, prompts: int) -> int:
        """Batches of `prompts` rows in one pass; the last may be padded (held-out splits only)."""
        return -(-len(self) // prompts)

    def batch(self, k: int, prompts: int | None = None) -> Batch:
        """Global batch `k` of P = `prompts` rows (default grpo.prompts), this process's share of it.

        Arrays as in `PromptBatch` and `Gold`. Raises IndexError past the end of a held-out split.
        """
        prompts = prompts or self.recipe.grpo.prompts
        if k < 0 or (self.split != "train" and k >= self.batches(prompts)):
            raise IndexError(f"split {self.split!r} has {self.batches(prompts)} batches of {prompts}, asked for number {k}")
        window, number = divmod(k, self._per_window(prompts))
        positions_KP, bucket_K = self._cut(prompts, window)
        own_P = self.share.of(positions_KP[number])
        rows = list(self._each(self._rows.__getitem__, own_P[own_P >= 0].tolist()))
        real, filler = len(rows), rows[0] if rows else self._rows[0]
        rows += [filler] * (len(own_P) - real)  # well-formed prompts too, but they count for nothing
        prompt = prompt_batch(list(map(self._prompt, rows)), self.tokenizer, self.vision, *self.bounds[bucket_K[number]], self._each)
        return Batch(prompt, self._gold(rows, real), [(row.example, row.view) for row in rows[:real]])

    def padding(self) -> str:
        """In words: the buckets, and what the longest prompts leave empty of them and would of data.prompt_tokens and data.patches."""
        one, data = np.ones_like(self.sizes), self.recipe.data
        rows = [f"{T} tokens, {I} patches ({(self.buckets == b).sum()} rows)" for b, (T, I) in enumerate(self.bounds)]
        tokens, patches = padding(self.sizes, self.bounds[self.buckets])
        most_tokens, most_patches = padding(self.sizes, one * (data.prompt_tokens, data.patches))
        return (
            f"{self.split}: {'; '.join(rows)}; padding {tokens:.0%} of tokens, {patches:.0%} of patches; "
            f"in one bucket {most_tokens:.0%}, {most_patches:.0%}"
        )

    def _per_window(self, prompts: int) -> int:
        """Batches that are cut at once: those of an epoch that are whole, or all of a held-out split."""
        return max(len(self) // prompts, 1) if self.split == "train" else self.batches(prompts)

    def _window(self, prompts: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream of rows of a window's batches, [K, P], -1 where the last has none, and their buckets [K]."""
        if self.split != "train":
            return cut(self.buckets, self.bounds, prompts)
        size = self._per_window(prompts) * prompts
        place_KP, bucket_K = cut(self.buckets[self._order.batch(size)[window]], self.bounds, prompts)
        order_K = place_KP.min(axis=1).argsort()
        return window * size + place_KP[order_K], bucket_K[order_K]

    def _draw(self, drawn: tuple[int, int], rng: np.random.Generator) -> Row:
        index, epoch = drawn
        example, ood = self._examples[index], self.recipe.data.ood
        hide_gold = bool(rng.random() < ood.share)  # safe rows too, so that a gap in the policy does not betray the label
        view = policy_view(self.taxonomy, ood, rng, level_of(example.modality), example.node, hide_gold)
        return Row(epoch * len(self._examples) + index, example, view)

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

    def _remembered(self, cache: Path) -> dict[int, tuple[int, int]]:
        """What `_fitting` found, from the file `cache` where it was written for the same things, else found now and written."""
        data, vision, tag = self.recipe.data, self.recipe.model.vision, self.recipe.answer.think_tag
        things = (
            replace(data, buckets=1, workers=1),  # what rows take does not depend on them
            vision,
            tag,
            self.prompts,
            self.taxonomy,
            self.split,
            len(self._examples),
            self.tokenizer.backend_tokenizer.to_str(),
        )
        key = hashlib.sha256(repr(things).encode()).hexdigest()
        if cache.exists() and (found := json.loads(cache.read_text()))["key"] == key:
            self.dropped.update(found["dropped"])
            return dict(zip(found["kept"], found["sizes"], strict=True))
        fitting = self._fitting()
        if jax.process_index() == 0:
            found = {"key": key, "kept": list(fitting), "sizes": list(fitting.values()), "dropped": self.dropped}
            replace_file(cache, json.dumps(found))
        return fitting

    def _fitting(self) -> dict[int, tuple[int, int]]:
        """The examples of this split that can be shown whole, by number, with the tokens and slots that each takes at most; counts the
        others."""
        longest = {level: self._policy(self._longest_view(level)) for level in ("leaf", "top")}
        fitting: dict[int, tuple[int, int]] = {}
        candidates = self._candidates()
        while some := list(itertools.islice(candidates, 64)):
            sizes = self._sizes([e for _, e in some], [longest[level_of(e.modality)] for _, e in some])
            self.dropped.update(size for size in sizes if isinstance(size, str))
            fitting |= {index: size for (index, _), size in zip(some, sizes, strict=True) if not isinstance(size, str)}
        return fitting

    def _sizes(self, examples: Sequence[Example], policies: Sequence[str]) -> list[tuple[int, int] | str]:
        """Of each example the tokens and slots for patches that it takes beside its policy; the reason where it cannot be shown whole."""

        def grids_of(example: Example) -> list[tuple[int, int]] | str:
            if self.reserved & {example.node, *example.accepted}:
                return "reserved"
            try:
                return [image_grid(load_image(raw).size, self.vision) for raw in example.images]
            except ValueError:
                return "image"

        found: list[Any] = list(self._each(grids_of, examples))
        grids = {n: grid for n, grid in enumerate(found) if not isinstance(grid, str)}
        texts = [self._text(examples[n], policies[n]) for n in grids]
        for n, (tokens, slots) in zip(grids, lay_out(texts, list(grids.values()), self.tokenizer, self.vision), strict=True):
            long = len(tokens) > self.recipe.data.prompt_tokens
            found[n] = "patches" if slots > self.recipe.data.patches else "prompt" if long else (len(tokens), slots)
        return found

    def _candidates(self) -> Iterator[tuple[int, Example]]:
        """Numbered examples of this split that it may show; counts the others."""
        training = self.split == "train"
        for index, example in enumerate(self._examples):
            if example.split != self.split:
                continue
            if training and example.source in EVALUATION_ONLY:
                raise ValueError(
                    f"example {example.id}: {example.source} is for evaluation only (its licence); take it out of the split train"
                )
            if training and self.never_seen & {example.node, *example.accepted}:
                self.dropped["never_seen"] += 1
            else:
                yield index, example
