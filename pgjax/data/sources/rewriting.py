"""The sets that the rewriter learns from and is measured on, by name, and a user's own rows."""

from collections.abc import Iterator
from pathlib import Path

from pgjax.data.sources.items import Item
from pgjax.taxonomy import Taxonomy


def read_items(name: str, root: Path, taxonomy: Taxonomy) -> Iterator[Item | str]:
    """The rows of a set: its items, and for every row left out the reason. ValueError for an unknown name, for a set that is not below
    `root`, and for a wrong row."""
    raise NotImplementedError(name)


def jsonl_items(path: Path, taxonomy: Taxonomy) -> Iterator[Item | str]:
    """A user's own rows, as `read_items` gives those of a set."""
    raise NotImplementedError(path)
