"""What a built dataset holds: counts by kind, lengths, picture sizes; and one row as a model is shown it."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pgjax.config import Recipe
from pgjax.conversation import load_prompts, messages
from pgjax.data.build import read_dataset, splits_of
from pgjax.data.images import FORMATS
from pgjax.data.schema import Example
from pgjax.pages.charts import text
from pgjax.pages.page import facts, table_of, whole_page
from pgjax.pages.samples import content_row, labels, thumbnail
from pgjax.pages.tables import Table
from pgjax.taxonomy import Taxonomy, full_view, level_of, load_taxonomy, render_policy
from pgjax.tokenizer import load_tokenizer
from pgjax.train.run_folder import read_config

QUANTILES = (0.5, 0.9, 0.99, 1.0)
NAMED = 60  # characters of a risk's name that are shown: it may come from anywhere


def category_of(example: Example, taxonomy: Taxonomy) -> str:
    """Id of the top level, "ood: NAME", "none" or "unknown"."""
    if example.category == "node" and example.node:
        return taxonomy.by_id(example.node).parent or example.node
    return f"ood: {(example.name or 'unnamed')[:NAMED]}" if example.category == "ood" else example.category


def unsafe(example: Example) -> bool:
    return "unsafe" in (example.request_label, example.response_label)


class Shown:
    """Prompts as a model is shown them: with the whole policy, by the templates and the tokenizer of a run folder or of a checkpoint's
    folder; without one the messages one after the other."""

    def __init__(self, model: Path | None):
        run = model and (model / "config.json").is_file() and (model / "tokenizer").is_dir()
        recipe = read_config(model) if model and run else Recipe()
        self.taxonomy, self.prompts = load_taxonomy(recipe.data.taxonomy), load_prompts(recipe.data.prompts)
        self._recipe, self._tokenizer = recipe, load_tokenizer(model / "tokenizer" if run else model) if model else None

    def text(self, example: Example) -> str:
        view = full_view(self.taxonomy, level_of(example.modality))
        policy = render_policy(self.taxonomy, view, self._recipe.data.descriptions)
        chat = messages(example, policy, self.prompts, self._recipe.answer.think_tag)
        if self._tokenizer:
            return self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        parts = lambda content: [content] if isinstance(content, str) else [part.get("text", "[image]") for part in content]  # noqa: E731
        return "\n\n".join(f"{message['role']}:\n{''.join(parts(message['content']))}" for message in chat)

    def length(self, example: Example) -> int:
        """Tokens of the prompt, without its picture's; without a model bytes of the conversation."""
        if self._tokenizer:
            return len(self._tokenizer(self.text(example), add_special_tokens=False)["input_ids"])
        return sum(len((part or "").encode()) for part in (example.request, example.response))

    @property
    def unit(self) -> str:
        return "prompt tokens" if self._tokenizer else "bytes of text"


def stats(folder: Path, model: Path | None = None) -> list[Table]:
    """ValueError where the folder is no dataset."""
    shown = Shown(model)
    kinds, sources, categories = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    lengths: dict[str, list[int]] = {}
    pixels: dict[str, list[int]] = {}
    splits = splits_of(folder)
    for split in splits:
        for example in read_dataset(folder, split):
            kinds[split, example.modality, example.request_label, example.response_label] += 1
            sources[example.source, split] += 1
            categories[category_of(example, shown.taxonomy), split, example.modality] += 1
            lengths.setdefault(f"{split} {example.modality}", []).append(shown.length(example))
            for data in example.images:
                pixels.setdefault(f"{split} {example.modality}", []).append(_pixels(data))
    return [
        Table("Rows", "Rows by labels", ("split", "modality", "request", "response", "rows"), _rows(kinds), ""),
        _crossed("Sources", "source", sources, splits),
        _crossed("Categories", "category", Counter({(c, f"{s} {m}"): n for (c, s, m), n in categories.items()}), sorted(lengths)),
        _quantiles(f"Lengths, {shown.unit}", lengths),
        _quantiles("Pictures, pixels", pixels),
    ]


def _rows(counts: Counter) -> list[tuple[str, ...]]:
    return [(*key, str(n)) for key, n in sorted(counts.items())]


def _crossed(title: str, name: str, counts: Counter, columns: Sequence[str]) -> Table:
    rows = [(key, *(str(counts[key, column]) for column in columns)) for key in sorted({key for key, _ in counts})]
    return Table("Rows", title, (name, *columns), rows, "")


def _quantiles(title: str, values: dict[str, list[int]]) -> Table:
    rows = [(name, *(str(round(float(q))) for q in np.quantile(those, QUANTILES))) for name, those in sorted(values.items())]
    return Table("Sizes", title, ("split and modality", *("most" if q == 1 else f"{q:.0%}" for q in QUANTILES)), rows, "")


def _pixels(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.width * image.height


def find(folder: Path, id: str) -> Example:
    """The row of that id in any split. ValueError where there is none."""
    for split in splits_of(folder):
        for example in read_dataset(folder, split):
            if example.id == id:
                return example
    raise ValueError(f"dataset {folder} has no row {id!r}; `pgjax data stats` lists its sources, and ids begin with them")


def gold(example: Example) -> dict[str, Any]:
    """What is known of a row, without its texts."""
    names = ("id", "group", "source", "split", "modality", "request_label", "response_label", "category", "node", "accepted", "name")
    return {name: getattr(example, name) for name in names if getattr(example, name) not in (None, ())}


def page(example: Example, shown: Shown, veil: bool) -> str:
    """One row: gold, pictures, prompt; with `veil` folded and blurred until clicked."""
    known = {name: ", ".join(value) if isinstance(value, tuple) else value for name, value in gold(example).items()}
    header = f"<h1>{labels([example.request_label, example.response_label])}</h1>{facts(known | {shown.unit: shown.length(example)})}"
    pictures = content_row({}, [thumbnail(data) for data in example.images], veil, 1)
    prompt = f"<details{'' if veil else ' open'}><summary>prompt</summary><pre>{text(shown.text(example), 10**6)}</pre></details>"
    body = table_of("", rows=pictures, kind="samples") + prompt
    return whole_page(example.id, header, {"As the model is shown it": body})
