"""What the readers share: where the data lies, lines and tables with their traps, label maps, and the split of a group."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pgjax.data.schema import Example
from pgjax.taxonomy import Taxonomy

HELD_OUT = 5  # one group in so many is held out


class Read(NamedTuple):
    """What a reader returns; every row of the files is in one of the two."""

    examples: list[Example]
    left_out: Counter[str]  # rows not used, by reason


def data_root(root: str | None) -> Path:
    """The folder of public sets: `data.root`, else the environment variable PGJAX_DATA. ValueError when neither names a folder."""
    chosen = root or os.environ.get("PGJAX_DATA")
    if not chosen:
        raise ValueError("public data: set --data.root or the environment variable PGJAX_DATA to the folder that holds the sets")
    if not Path(chosen).is_dir():
        raise ValueError(f"public data: {chosen} is no folder; set --data.root or PGJAX_DATA to the one that holds the sets")
    return Path(chosen)


def read_bytes(path: Path) -> bytes:
    """ValueError, naming the file and what to set, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"public data: {path} cannot be read ({error.strerror}); is --data.root or PGJAX_DATA right?") from None


def read_text(path: Path) -> str:
    """UTF-8 with or without a byte-order mark, gzip by suffix."""
    data = read_bytes(path)
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"public data: {path} is broken ({error}); fetch it again") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects, one a line. Lines end at "\\n" alone: texts hold U+2028 and U+0085, where `splitlines` would cut them."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"public data: {path}:{number}: not JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(row, dict):
                raise ValueError(f"public data: {path}:{number}: expected an object")
            rows.append(row)
    return rows


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Rows as dicts. ValueError when one of `columns` is missing from the header or from a row."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    if missing := [c for c in columns if c not in (reader.fieldnames or ())]:
        raise ValueError(f"public data: {path} lacks the column {missing[0]!r}; it has {', '.join(reader.fieldnames or ()) or 'none'}")
    rows = []
    for row in reader:
        if any(row[c] is None for c in columns):
            raise ValueError(f"public data: {path}:{reader.line_num}: the row ends early")
        rows.append(row)
    return rows


def split_of(group: str) -> str:
    """ "train" or "eval", by a hash of the group's name alone: the same in every run, whatever else is in the mix."""
    return "eval" if order_of(group) % HELD_OUT == 0 else "train"


def order_of(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8])


def text_group(text: str) -> str:
    """One group for texts that differ in case, spaces or punctuation at most, so that copies never part over splits, nor over sets."""
    return "text-" + hashlib.sha256(re.sub(r"[\W_]+", " ", text.casefold()).strip().encode()).hexdigest()[:16]


class LabelMap:
    """Foreign labels -> what is known of an example's category, from labels/NAME.yaml (`order` is the file's)."""

    def __init__(self, name: str, taxonomy: Taxonomy):
        path = Path(__file__).parent / "labels" / f"{name}.yaml"
        self._taxonomy = taxonomy
        self._map: dict[str, list[str] | str] = yaml.safe_load(path.read_text())
        self.order = list(self._map)
        try:
            for ids in self._map.values():
                for id in ids if isinstance(ids, list) else ():
                    taxonomy.by_id(id)
        except ValueError as error:
            raise ValueError(f"label map {path.name} is made for the packaged taxonomy: {error}") from None

    def withheld(self, label: str) -> bool:
        return self._map[label] == "withheld"

    def category(self, labels: Iterable[str]) -> dict[str, Any]:
        """The fields category, node, accepted and name of an `Example` with these unsafe labels (one at least)."""
        labels = sorted(labels, key=self.order.index)
        ids = [id for label in labels if self._map[label] != "ood" for id in self._map[label]]
        if not ids:
            return {"category": "ood", "name": labels[0]}
        accepted = tuple(dict.fromkeys(id for id in ids if id != ids[0]))
        return {"category": "node", "node": ids[0], "accepted": accepted, "name": self._taxonomy.by_id(ids[0]).name}
