"""yushaohan/ProGuard-Data, the set behind the published guard (PAPERS A5)."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgjax.data.schema import Example, Label
from pgjax.data.sources.examples import example
from pgjax.data.sources.files import LABEL, NO_PICTURE, VALUE, WITHHELD, NotUsed, Rows, Unusable, each, image_group, picture, text_group
from pgjax.data.sources.label_map import no_children
from pgjax.data.sources.tables import Row, read_rows
from pgjax.taxonomy import Category, Taxonomy

COLUMNS = ("modality", "message", "query_label", "response_label", "category", "original_category")
_MODALITIES = {"text": "text", "image": "image", "text-image": "text_image", "text_image": "text_image"}
_LABELS: tuple[str, str, Label] = ("safe", "unsafe", "unknown")


def proguard_data(root: Path, taxonomy: Taxonomy) -> Rows:
    """proguard_data/**/*.parquet (no licence stated): `modality` text, text-image or image; `message`, a list of objects with `role` (user,
    assistant) and `content`, or that list as JSON; `query_label`, `response_label`; `category`, an id of the taxonomy or nothing, and
    `original_category`, its name, which is all there is of a risk that the taxonomy lacks. `synonymous_phrase` is not read.

    The last thing that the user says is the request, what the assistant says to it the response, all before are turns. Where the files
    hold pictures is not published: they are looked for in `image` and `images` (objects with `bytes`, or paths below proguard_data/), and
    as parts of a message's content. A picture alone has no request, whatever text stands beside it.
    """

    nodes = {name: node for node in taxonomy.nodes for name in (node.id.casefold(), node.name.casefold())}

    def read(row: Row) -> Iterator[Example]:
        modality = _MODALITIES.get(row.text("modality"))
        if modality is None:
            raise Unusable(LABEL, "has a `modality` that is none of text, text-image, image")
        turns, pictures = _message(row)
        asked = max((n for n, (role, _) in enumerate(turns) if role == "user"), default=None)
        if modality != "image" and (asked is None or len(turns) > asked + 2):
            raise Unusable(VALUE, "needs in `message` what a user said, and at most one answer behind it")
        pictures = [*_listed(row, "image"), *_listed(row, "images"), *pictures]
        image = None if modality == "text" else _picture(root / "proguard_data", pictures)
        id, about, request_label = f"proguard_data-{row.serial:05d}", _about(row, nodes), row.label("query_label", *_LABELS)
        if asked is None or modality == "image":
            group = image_group(image or b"")
            yield example("proguard_data", id, group, image=image, request_label=request_label, about=about)
            return
        request, response = turns[asked][1], turns[asked + 1][1] if asked + 1 < len(turns) else ""
        group = text_group(request) if image is None else image_group(image)
        known: dict[str, Any] = {"response_label": row.label("response_label", *_LABELS), "request_label": request_label, "about": about}
        made = example("proguard_data", id, group, request=request, response=response, image=image, **known)
        yield replace(made, turns=tuple(turns[:asked]))

    return each(read_rows(root, "proguard_data/**/*.parquet", COLUMNS, ("image", "images")), read)


def _message(row: Row) -> tuple[list[tuple[str, str]], list[Any]]:
    """(role, text) of what user and assistant said, and the pictures among it."""
    said = row.values["message"]
    try:
        said = json.loads(said) if isinstance(said, str) else said or []
        turns, pictures = [], []
        for entry in said:
            content = entry["content"] or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = [part["text"] or "" for part in parts if part["type"] == "text"]
            pictures += [part["image"] for part in parts if part["type"] == "image"]
            if entry["role"] in ("user", "assistant"):
                text = "\n".join(texts).replace("<image>", "").strip()
                turns.append((entry["role"], text.encode("utf-8", "replace").decode()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise Unusable(VALUE, "needs in `message` a list of objects with `role` and `content`") from None
    return turns, pictures


def _listed(row: Row, column: str) -> list[Any]:
    value = row.values.get(column)
    return value if isinstance(value, list) else [value] if value else []


def _picture(folder: Path, found: list[Any]) -> bytes:
    """The first of what a row holds: an object with `bytes`, or with a `path`, or a path. NotUsed where there is none."""
    for entry in found:
        if isinstance(entry, dict):
            entry = entry.get("bytes") or entry.get("path")
        if isinstance(entry, str):
            return picture(folder, entry)
        if isinstance(entry, bytes):
            return entry
    raise NotUsed(NO_PICTURE)


def _about(row: Row, nodes: dict[str, Category]) -> dict[str, Any]:
    """What is known of the category. A name of the taxonomy beside no id is one that was hidden in the published prompts."""
    id, name = row.text("category").strip(), row.text("original_category").strip()
    no_children(name)
    node = nodes.get((id or name).casefold())
    if node and node.reserved:
        raise NotUsed(WITHHELD)
    if node:
        return {"category": "node", "node": node.id, "name": node.name}
    if id:
        raise Unusable(LABEL, "has a `category` that the taxonomy lacks")
    return {"category": "ood", "name": name} if name else {"category": "unknown"}
