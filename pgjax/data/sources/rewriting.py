"""The sets that the rewriter learns from and is measured on, by name, and a user's own rows.

Readers are iterators of `Item | str`: the items one by one, and for every row that is left out the reason. Who consumes one keeps what it
wants and counts the reasons as they come by.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from pgjax.data.jsonl import read_jsonl
from pgjax.data.rows import labelled
from pgjax.data.sources import items
from pgjax.data.sources.files import PICTURES, WITHHELD, LeftOut, choose, image_group, split_of, strict, text_group
from pgjax.data.sources.items import Item
from pgjax.data.sources.registry import SOURCES
from pgjax.taxonomy import Taxonomy

ITEM_KEYS = ("id", "request", "image", "request_label", "category", "name", "safe", "unsafe")
ITEM_SETS: dict[str, Callable[[Path, Taxonomy], items.Items]] = {
    read.__name__: read for read in (items.vlguard, items.spa_vl, items.vlsbench, items.siuo, items.mm_safetybench, items.figstep)
}


def read_items(name: str, root: Path, taxonomy: Taxonomy) -> Iterator[Item | str]:
    """The rows of a set: its items, and for every one left out the reason. ValueError, at once for an unknown name and for a set that is
    not below `root`, while reading for a wrong row; a picture that cannot be decoded is a reason like others."""
    choose("set", name, {name: SOURCES[name] for name in ITEM_SETS}, root)
    rows = ITEM_SETS[name](root, taxonomy)
    rows = (row._replace(broken=False) if isinstance(row, LeftOut) and row.kind in PICTURES else row for row in rows)
    return (row.kind if isinstance(row, LeftOut) else row for row in strict(rows))


def jsonl_items(path: Path, taxonomy: Taxonomy) -> Iterator[Item | str]:
    """A user's own rows, JSON Lines with the keys ITEM_KEYS, of which only `request` must be there: `image` is a path beside the file,
    `request_label` safe or unsafe (left out: unsafe), `category` a taxonomy id, or "ood" with the risk's `name`; `safe` and `unsafe` are
    answers. A row's group is that of its picture, or of its text, like those of the sets above.

    ValueError, naming the line, for a key that is not of these, a wrong value, a missing picture, an id that is there before.
    """
    ids: set[str] = set()
    for line in read_jsonl(path):
        if unknown := sorted(set(line.row) - set(ITEM_KEYS)):
            raise ValueError(f"{line.where}: unknown key {unknown[0][:40]!r}; a row has {', '.join(ITEM_KEYS)}")
        if not line.text("request").strip():
            raise ValueError(f"{line.where}: 'request' is empty; write what the user asks")
        safe, unsafe = (line.text(key) if key in line.row else "" for key in ("safe", "unsafe"))
        row = {key: value for key, value in line.row.items() if key not in ("safe", "unsafe")}
        row |= {"id": row.get("id") or f"{path.stem}-{line.number}", "request_label": row.get("request_label") or "unsafe"}
        known = labelled(line._replace(row=row), taxonomy, "train")
        if known.id in ids:
            raise ValueError(f"{line.where}: the id {known.id[:40]!r} is that of an earlier line; give each its own")
        ids.add(known.id)
        if known.node and taxonomy.by_id(known.node).reserved:
            yield WITHHELD
            continue
        group = image_group(known.images[0]) if known.images else text_group(known.request or "")
        known = replace(known, group=group, split=split_of(group))
        yield Item(known, safe if safe.strip() else None, unsafe if unsafe.strip() else None)
