"""Rows of published files, one after the other, with the place they stand at: JSON, JSON Lines, CSV and parquet, with their traps.

What is broken is a `LeftOut` among the rows. A bad row is passed over; a file that cannot be read on is one `LeftOut` and its end.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from pgjax.data.schema import Label
from pgjax.data.sources.files import BROKEN_FILE, COLUMN, ENCODING, LABEL, NOT_JSON, VALUE, LeftOut, Unusable

csv.field_size_limit(2**24)  # texts may be longer than the 128 KiB that the module takes by itself
LONGEST_LINE = 2**26  # bytes of a line of JSON; more would be no row of texts
BATCH = 64  # rows of a parquet file decoded at once


class Row(NamedTuple):
    """A row with the place it stands at. Complaints name the place and the column, never what stands there."""

    file: str  # below the data's root
    number: int  # in its file, from 1
    serial: int  # in all files of the set
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}: row {self.number}"

    def text(self, column: str) -> str:
        """ "" where there is nothing. Halves of a character (lone surrogates), which tokenizers do not take, become `?`."""
        if column not in self.values:
            raise Unusable(COLUMN, f"needs a text in `{column}`, or nothing")
        if not isinstance(value := self.values[column], str | None):
            raise Unusable(VALUE, f"needs a text in `{column}`, or nothing")
        return (value or "").encode("utf-8", "replace").decode()

    def name(self, column: str) -> str:
        """The id there, a text or a number."""
        if not isinstance(value := self.values.get(column), str | int) or value == "":
            raise Unusable(VALUE if column in self.values else COLUMN, f"needs an id in `{column}`")
        return str(value)

    def label(self, column: str, safe: str | bool, unsafe: str | bool, missing: Label | None = None) -> Label:
        """What stands for `safe` and for `unsafe` there; `missing` is the label where there is nothing."""
        value = self.values.get(column)
        if column in self.values and value in (None, "") and missing:
            return missing
        if column not in self.values or not isinstance(value, str | bool | int) or value not in (safe, unsafe):
            kind = LABEL if column in self.values else COLUMN
            raise Unusable(kind, f"has a label in `{column}` that is neither {unsafe} nor {safe}")
        return "safe" if value == safe else "unsafe"

    def objects(self, column: str) -> list["Row"]:
        """The objects of a list there, or the one object, as rows of this place."""
        value = self.values.get(column)
        found: list[Any] = value if isinstance(value, list) else [value]
        if not found or not all(isinstance(entry, dict) for entry in found):
            raise Unusable(VALUE if column in self.values else COLUMN, f"needs a list of objects in `{column}`")
        return [self._replace(values=entry) for entry in found]

    def one(self, column: str) -> "Row":
        """The one object there."""
        if len(found := self.objects(column)) > 1:
            raise Unusable(VALUE, f"needs one object in `{column}`")
        return found[0]

    def picture(self, column: str) -> bytes:
        """Of an object with `bytes`, as parquet files hold pictures; b"" where there is none."""
        value = self.values.get(column)
        if not isinstance(value, dict | None):
            raise Unusable(VALUE, f"needs an object with `bytes` in `{column}`")
        return (value or {}).get("bytes") or b""


def read_rows(
    root: Path,
    pattern: str,
    columns: Sequence[str] = (),
    optional: Sequence[str] = (),
    *,
    names: Sequence[str] = (),
    keyed: bool = False,
    one: bool = False,
) -> Iterator[Row | LeftOut]:
    """The rows of all files under `root` that match a glob pattern, in the order of their names, in the format that their suffix says.

    A table lacks none of `columns`; of a parquet file these and the `optional` ones are decoded, of other files all. `names` are those
    of a CSV file's columns where it has no header. `keyed`: a JSON file holds one object, whose keys and values are the rows' `key` and
    `value`. `one`: several files would be copies of the same rows.
    """
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    if not found:
        yield LeftOut(
            BROKEN_FILE, pattern, f"is not there below {root}; is --data.root (data build: --root) or PGJAX_DATA right?", True, 1.0
        )
    if one and len(found) > 1:
        yield LeftOut(BROKEN_FILE, pattern, f"{found[0].name} and {found[1].name} are both there; leave the one that is meant", True, 1.0)
        return
    before, lost = 0, 1 / max(len(found), 1)
    for path in found:
        file, number = path.relative_to(root).as_posix(), 0
        kind = [suffix for suffix in path.suffixes if suffix not in (".gz", ".xz")][-1:]
        try:
            match kind:
                case [".parquet"]:
                    rows = _parquet(path, columns, optional)
                case [".csv"]:
                    rows = _csv(path, columns, names)
                case [".json"]:
                    rows = _keyed(path) if keyed else _json(path)
                case _:
                    rows = _json_lines(path)
            for number, values in rows:
                if isinstance(values, Unusable):
                    yield LeftOut(values.kind, f"{file}: row {number}", values.reason, broken=True)
                else:
                    yield Row(file, number, before + number, values)
        except Unusable as error:
            yield LeftOut(error.kind, file, error.reason, True, lost)
        except UnicodeDecodeError as error:
            yield LeftOut(ENCODING, file, f"is broken behind row {number}: not UTF-8 ({error.reason}); fetch it again", True, lost)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:200]
            yield LeftOut(BROKEN_FILE, file, f"is broken behind row {number} ({reason}); fetch it again", True, lost)
        before += number


def by_key(rows: Iterable[Row | LeftOut], *columns: str) -> tuple[dict[Any, Row], list[LeftOut]]:
    """Rows to join others with, by the value of a column, or by those of several; and what is left out."""
    found: dict[Any, Row] = {}
    left_out = []
    for row in rows:
        if isinstance(row, LeftOut):
            left_out.append(row)
        else:
            key = tuple(row.values[column] for column in columns)
            found[key if len(key) > 1 else key[0]] = row
    return found, left_out


# --- formats: (number, values of the row or what is wrong with it), one after the other ---------------------------------------------

Numbered = Iterator[tuple[int, dict[str, Any] | Unusable]]


def _open(path: Path) -> IO[bytes]:
    """Bytes, gzip and xz by suffix."""
    opened: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return opened.get(path.suffix, open)(path, "rb")


def _object(text: str | bytes) -> dict[str, Any] | Unusable:
    try:
        row = json.loads(text)
    except UnicodeDecodeError:
        return Unusable(ENCODING, "is not UTF-8; fetch the file again")
    except json.JSONDecodeError as error:
        return Unusable(NOT_JSON, f"is not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError):
        return Unusable(NOT_JSON, "is no JSON that is read here")
    return row if isinstance(row, dict) else Unusable(NOT_JSON, "must be an object")


def _json_lines(path: Path) -> Numbered:
    """Lines end at "\\n" alone: texts hold U+2028 and U+0085, where `splitlines` would cut them."""
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise Unusable(BROKEN_FILE, f"has a line {number} longer than {LONGEST_LINE >> 20} MiB")
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, _object(line)


def _json(path: Path) -> Numbered:
    """Objects, in one array or one a line: both are published under names that end in .json."""
    with _open(path) as file:
        if file.read(64).decode("utf-8-sig", "replace").lstrip().startswith("{"):
            yield from _json_lines(path)
            return
    rows = _whole(path)
    if not isinstance(rows, list):
        raise Unusable(NOT_JSON, "must be an array of objects")
    yield from enumerate((row if isinstance(row, dict) else Unusable(NOT_JSON, "must be an object") for row in rows), 1)


def _keyed(path: Path) -> Numbered:
    rows = _whole(path)
    if not isinstance(rows, dict):
        raise Unusable(NOT_JSON, "must be an object of rows")
    yield from enumerate(({"key": key, "value": value} for key, value in rows.items()), 1)


def _whole(path: Path) -> Any:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unusable(NOT_JSON, f"is not JSON (line {error.lineno}: {error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):
        raise Unusable(NOT_JSON, "is no JSON that is read here") from None


def _csv(path: Path, columns: Iterable[str], names: Sequence[str]) -> Numbered:
    with _open(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), names or None)
        try:
            _check_columns(columns, reader.fieldnames or ())
            for number, row in enumerate(reader, 1):
                short = any(row[c] is None for c in columns)
                yield number, Unusable(VALUE, "ends early") if short else row
        except csv.Error as error:
            raise Unusable(BROKEN_FILE, f"is not CSV behind line {reader.line_num} ({error}); fetch it again") from None


def _parquet(path: Path, columns: Sequence[str], optional: Iterable[str]) -> Numbered:
    """Row by row, since files of pictures may not fit."""
    from pyarrow import ArrowException  # here, since it takes a tenth of a second that no other reader needs
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # by itself it fetches the whole file ahead
            there = file.schema_arrow.names
            _check_columns(columns, there)
            for batch in file.iter_batches(BATCH, columns=[*columns, *(c for c in optional if c in there)]):
                for n in range(batch.num_rows):
                    number += 1
                    try:
                        yield number, {name: batch.column(name)[n].as_py() for name in batch.schema.names}
                    except UnicodeDecodeError:
                        yield number, Unusable(ENCODING, "holds a text that is not UTF-8")
    except ArrowException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Unusable(BROKEN_FILE, f"is broken behind row {number} ({reason}); fetch it again") from None


def _check_columns(columns: Iterable[str], there: Iterable[str]) -> None:
    if missing := [c for c in columns if c not in there]:
        raise Unusable(COLUMN, f"lacks the column {missing[0]!r}; it has {_named(there)}")


def _named(columns: Iterable[str]) -> str:
    """Column names for a message. A file without its header has a row there, which no message repeats: then their number."""
    names = list(columns)
    plain = all(re.fullmatch(r"[\w. -]{1,40}", str(name)) for name in names) and len(names) > 1
    return ", ".join(names) if plain else f"{len(names)} columns, which look like no header"
