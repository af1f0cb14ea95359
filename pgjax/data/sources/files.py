"""What the readers share: where the data lies, what becomes of a row that is not used, pictures named by path, groups and their split."""

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from pgjax.data.images import MAX_FILE_BYTES
from pgjax.data.schema import Example

HELD_OUT = 5  # one group in so many is held out

# Kinds of rows that are fine and not used, and of rows and files that are broken, to count by.
WITHHELD, NO_PICTURE, EMPTY, NO_LABEL = "withheld category", "no picture", "empty", "label unknown"
BROKEN_FILE, ENCODING, NOT_JSON, COLUMN, VALUE = "broken file", "wrong encoding", "not JSON", "missing column", "wrong value"
LABEL, OUTSIDE_FOLDER, BAD_PICTURE, LARGE_PICTURE = "unknown label", "path outside the set", "unreadable picture", "picture too large"
PICTURES = (BAD_PICTURE, LARGE_PICTURE)


class LeftOut(NamedTuple):
    """A row that is not used or, where `broken`, a row or a file that cannot be. It never holds what stands there."""

    kind: str  # a few words to count by
    where: str  # the file, relative to the data's root, and the row
    reason: str = ""  # goes on where `where` ends: "has a label in ..."
    broken: bool = False
    lost: float = 0.0  # of a file that cannot be read on: its share of the set's files


class Unusable(Exception):
    """Raised where a row turns out to be one to leave out; `each` makes it a `LeftOut`."""

    def __init__(self, kind: str, reason: str = "", broken: bool = True):
        super().__init__(reason or kind)
        self.kind, self.reason, self.broken = kind, reason, broken


class NotUsed(Unusable):
    """Of a row that is fine: `kind` says it all."""

    def __init__(self, kind: str):
        super().__init__(kind, broken=False)


class Read(NamedTuple):
    """What evaluation takes of a set; every row of the files is in one of the two."""

    examples: list[Example]
    left_out: Counter[str]  # rows not used, by kind


Rows = Iterator[Example | LeftOut]  # what a reader gives, one after the other: a set of pictures does not fit into memory
Found = TypeVar("Found", bound="Placed")
Made = TypeVar("Made")


class Placed(Protocol):
    @property
    def where(self) -> str: ...


def each(rows: Iterable[Found | LeftOut], read: Callable[[Found], Iterable[Made]]) -> Iterator[Made | LeftOut]:
    """What `read` makes of each row; where it raises Unusable, the row is left out from there on."""
    for row in rows:
        if isinstance(row, LeftOut):
            yield row
            continue
        try:
            yield from read(row)
        except Unusable as error:
            yield LeftOut(error.kind, row.where, error.reason, error.broken)


def strict(rows: Iterable[Made | LeftOut]) -> Iterator[Made | LeftOut]:
    """The rows as they come; ValueError with the place and the reason of the first broken one."""
    for row in rows:
        if isinstance(row, LeftOut) and row.broken:
            raise ValueError(f"public data: {row.where} {row.reason}")
        yield row


def gather(rows: Iterable[Example | LeftOut]) -> Read:
    """All rows, for evaluation: `strict`; rows without any label, which cannot measure, are left out."""
    examples, left_out = [], Counter[str]()
    for row in strict(rows):
        if isinstance(row, LeftOut):
            left_out[row.kind] += 1
        elif {row.request_label, row.response_label} <= {"unknown", "absent"}:
            left_out[NO_LABEL] += 1
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
        raise ValueError(
            "public data: set PGJAX_DATA, or --data.root (evaluate: --data; synthesize and data build: --root), to the sets' folder"
        )
    if not Path(chosen).is_dir():
        raise ValueError(f"public data: {chosen} is no folder; set --data.root (data build: --root) or PGJAX_DATA to that of the sets")
    return Path(chosen)


def picture(folder: Path, *names: str) -> bytes:
    """The picture file that a row names by its path below `folder`; of several names the first that is there.

    Unusable: no such file, a path that leads out of the folder (by "..", from the root, or through a link), a file that cannot be read.
    """
    for name in names:
        try:
            path, home = (folder / name).resolve(), folder.resolve()
            if not path.is_relative_to(home):
                raise Unusable(OUTSIDE_FOLDER, "names a picture outside of its set's folder")
            if path.is_file():
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise Unusable(LARGE_PICTURE, f"names a picture file larger than {MAX_FILE_BYTES >> 20} MiB")
                return path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # no path at all, a circle of links, no right to read it
            raise Unusable(BAD_PICTURE, "names a picture that cannot be read") from None
    raise NotUsed(NO_PICTURE)


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
