"""What the readers share of files: where the data lies, lines and tables with their traps; groups and their split."""

import csv
import difflib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pgjax.data.schema import Example, Label

csv.field_size_limit(2**24)  # texts may be longer than the 128 KiB that the module takes by itself
HELD_OUT = 5  # one group in so many is held out
BATCH = 64  # rows of a parquet file decoded at once


class Read(NamedTuple):
    """What a reader returns; every row of the files is in one of the two."""

    examples: list[Example]
    left_out: Counter[str]  # rows not used, by reason


class Row(NamedTuple):
    """A row with the place it stands at. Complaints name the place and the column, never what stands there."""

    path: Path
    number: int  # from 1
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"public data: {self.path}: row {self.number}"

    def text(self, column: str) -> str:
        """ "" where there is nothing."""
        if column not in self.values or not isinstance(self.values[column], str | None):
            raise ValueError(f"{self.where} needs a text in `{column}`, or nothing")
        return self.values[column] or ""

    def label(self, column: str, safe: str | bool, unsafe: str | bool, missing: Label | None = None) -> Label:
        """What stands for `safe` and for `unsafe` there; `missing` is the label where there is nothing."""
        value = self.values.get(column)
        if column in self.values and value in (None, "") and missing:
            return missing
        if value not in (safe, unsafe):
            raise ValueError(f"{self.where} has a label in `{column}` that is neither {unsafe} nor {safe}")
        return "safe" if value == safe else "unsafe"


def gather(rows: Iterable[Example | str]) -> Read:
    """Of each row its example, or the reason why it is left out."""
    examples, left_out = [], Counter[str]()
    for row in rows:
        if isinstance(row, str):
            left_out[row] += 1
        else:
            examples.append(row)
    return Read(examples, left_out)


class Published(Protocol):
    """A set as its table lists it."""

    @property
    def where(self) -> str | None: ...  # its file below the root, or a glob pattern for several; None: it comes with this package
    @property
    def origin(self) -> str: ...  # where it is published


Set = TypeVar("Set", bound=Published)


def choose(kind: str, name: str, sets: Mapping[str, Set], root: Path) -> Set:
    """The set of that name. ValueError for an unknown name, with the nearest one, and for a set that is not below `root`."""
    if name not in sets:
        near = difflib.get_close_matches(name, sets, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sets)}"
        raise ValueError(f"there is no {kind} {name[:40]!r}; {hint}")
    where = sets[name].where
    if where and not any(root.glob(where)):
        raise ValueError(f"{kind} {name}: {root / where} is not there; get the set from {sets[name].origin}")
    return sets[name]


def data_root(root: str | None) -> Path:
    """The folder of public sets: `data.root`, else the environment variable PGJAX_DATA. ValueError when neither names a folder."""
    chosen = root or os.environ.get("PGJAX_DATA")
    if not chosen:
        raise ValueError("public data: set PGJAX_DATA, or --data.root (evaluate: --data, synthesize: --root), to the sets' folder")
    if not Path(chosen).is_dir():
        raise ValueError(f"public data: {chosen} is no folder; set --data.root or PGJAX_DATA to the one that holds the sets")
    return Path(chosen)


def find(root: Path, pattern: str) -> list[Path]:
    """Files under `root` that match a glob pattern, sorted; ValueError where there are none."""
    if not (found := sorted(root.glob(pattern))):
        raise ValueError(f"public data: {root / pattern} is not there; is --data.root or PGJAX_DATA right?")
    return found


def find_one(root: Path, pattern: str) -> Path:
    if len(found := find(root, pattern)) > 1:
        raise ValueError(f"public data: {found[0]} and {found[1].name} are both there; leave the one that is meant")
    return found[0]


def read_bytes(path: Path) -> bytes:
    """ValueError, naming the file and what to set, where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"public data: {path} cannot be read ({error.strerror}); is --data.root or PGJAX_DATA right?") from None


def read_text(path: Path) -> str:
    """UTF-8 with or without a byte-order mark, gzip and xz by suffix."""
    data = read_bytes(path)
    try:
        return {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)(data).decode("utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"public data: {path} is broken ({error}); fetch it again") from None


def read_json_lines(path: Path) -> list[Row]:
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
            rows.append(Row(path, number, row))
    return rows


def read_json_rows(path: Path) -> list[Row]:
    """Objects, in one array or one a line: both are published under names that end in .json."""
    text = read_text(path)
    if text.lstrip().startswith("{"):
        return read_json_lines(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"public data: {path}:{error.lineno}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"public data: {path}: expected an array of objects")
    return [Row(path, number, row) for number, row in enumerate(rows, 1)]


def read_csv(path: Path, columns: Iterable[str]) -> list[Row]:
    """ValueError when one of `columns` is missing from the header or from a row."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows = []
    try:
        _check_columns(path, columns, reader.fieldnames or ())
        for number, row in enumerate(reader, 1):
            if any(row[c] is None for c in columns):
                raise ValueError(f"public data: {path}:{reader.line_num}: the row ends early")
            rows.append(Row(path, number, row))
    except csv.Error as error:
        raise ValueError(f"public data: {path}:{reader.line_num}: not CSV ({error}); fetch it again") from None
    return rows


def read_parquet(path: Path, columns: Iterable[str], optional: Iterable[str] = ()) -> list[Row]:
    """All of `parquet_rows`."""
    return list(parquet_rows(path, columns, optional))


def parquet_rows(path: Path, columns: Iterable[str], optional: Iterable[str] = ()) -> Iterator[Row]:
    """Row by row, since files of pictures may not fit. Only these columns are decoded; ValueError when one of `columns` is missing."""
    from pyarrow import ArrowException  # here, since it takes a tenth of a second that no other reader needs
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # by itself it fetches the whole file ahead
            names = file.schema_arrow.names
            _check_columns(path, columns, names)
            batches = file.iter_batches(BATCH, columns=[*columns, *(c for c in optional if c in names)])
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield Row(path, number, row)
    except (ArrowException, OSError) as error:
        raise ValueError(f"public data: {path} is broken ({str(error).splitlines()[0]}); fetch it again") from None


def _check_columns(path: Path, columns: Iterable[str], there: Iterable[str]) -> None:
    if missing := [c for c in columns if c not in there]:
        raise ValueError(f"public data: {path} lacks the column {missing[0]!r}; it has {_named(there)}")


def _named(columns: Iterable[str]) -> str:
    """Column names for a message. A file without its header has a row there, which no message repeats: then their number."""
    names = list(columns)
    plain = all(re.fullmatch(r"[\w. -]{1,40}", str(name)) for name in names) and len(names) > 1
    return ", ".join(names) if plain else f"{len(names)} columns, which look like no header"


def split_of(group: str) -> str:
    """ "train" or "eval", by a hash of the group's name alone: the same in every run, whatever else is in the mix."""
    return "eval" if order_of(group) % HELD_OUT == 0 else "train"


def order_of(group: str) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8])


def first_groups(examples: list[Example], limit: int) -> list[Example]:
    """At most so many rows, whole groups in an order by a hash of their names; of a larger first group its first rows."""
    ordered = sorted(examples, key=lambda example: (order_of(example.group), example.group, example.id))
    while 0 < limit < len(ordered) and ordered[limit - 1].group == ordered[limit].group != ordered[0].group:
        limit -= 1
    return ordered[:limit]


def normalised(text: str) -> str:
    """What texts share that differ in case, spaces or punctuation at most."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def text_group(text: str) -> str:
    """One group for texts with one normalised form, so that copies never part over splits, nor over sets."""
    return "text-" + hashlib.sha256(normalised(text).encode()).hexdigest()[:16]


def image_group(data: bytes) -> str:
    """One group for all that is asked about a picture file, in whatever set it occurs."""
    return "image-" + hashlib.sha256(data).hexdigest()[:16]
