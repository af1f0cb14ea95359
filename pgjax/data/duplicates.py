"""Rows that say the same: the content key that names a row, and which rows of a build go because another says it already.

Exact duplicates have one content key: equal requests and responses but for case, spaces and punctuation, and the same picture files.
Near duplicates have the same picture files, or none, and texts whose shingles overlap: sets of SHINGLE characters that follow each other
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.2: 5 for texts as short as e-mails), compared by their Jaccard similarity.
MinHash and LSH find the candidates, the sets of the likeliest decide.
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from rensa import RMinHash, RMinHashLSH

from pgjax.data.schema import Example
from pgjax.data.sources.files import normalised

SHINGLE = 5
COMPARED = 20_000  # characters of a text, its first: a book's shingles would fill the memory
PERMUTATIONS = 120
FOUND = 0.999  # probability that a pair at the threshold becomes a candidate
CHECKED = 16  # candidates compared by their sets, the likeliest: rows made from one template have thousands
SLACK = 0.18  # four standard errors of a similarity estimated from so many permutations, at most

# Why a row goes.
CONFLICT = "conflict"  # labelled safe here and unsafe there: no copy stays
EXACT, NEAR = "exact duplicate", "near duplicate"
EVALUATION = "in evaluation"  # of training, while evaluation has it
LEAKED = "in a benchmark"  # of training, while a named benchmark has it


def content_key(example: Example) -> bytes:
    """16 bytes that equal examples share, whatever their labels: of normalised texts, earlier turns included, and picture files."""
    texts = [normalised(example.request or ""), normalised(example.response or "")]
    texts += [f"{role} {normalised(text)}" for role, text in example.turns]
    pictures = b"".join(hashlib.sha256(data).digest() for data in example.images)
    return hashlib.sha256("\0".join(texts).encode("utf-8", "replace") + b"\0\0" + pictures).digest()[:16]


def shown_keys(example: Example) -> set[bytes]:
    """Keys of what a training row shows: of all of it, and of its prompt alone."""
    return {content_key(example), content_key(replace(example, response=None))}


def asked_key(example: Example) -> bytes:
    """The key of what an evaluation row tests: of its prompt where the request is labelled, else of all of it, so that a prompt that was
    trained on with another response is found too."""
    return content_key(example if example.request_label == "unknown" else replace(example, response=None))


class Record(NamedTuple):
    """What cleaning must know of a row; its pictures are not among it."""

    key: bytes  # content_key
    pictures: str  # a digest of the picture files, "" where there are none
    prompt: str  # normalised, earlier turns included
    response: str
    labels: tuple[str, str]  # of request and response
    known: int  # labels and category
    training: bool
    place: str  # source and id, for an order that does not depend on where a row was met

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.response}".strip()

    @property
    def asked(self) -> str:
        """The text that `asked_key` is about."""
        return self.text if self.labels[0] == "unknown" else self.prompt


def record(example: Example) -> Record:
    """Any split but "train" is evaluation."""
    labels = example.request_label, example.response_label
    return Record(
        content_key(example),
        hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in example.images)).hexdigest()[:16] if example.images else "",
        normalised(" ".join([*(text for _, text in example.turns), example.request or ""])),
        normalised(example.response or ""),
        labels,
        sum(value != "unknown" for value in (*labels, example.category)),
        example.split == "train",
        f"{example.source} {example.id}",
    )


class Cleaned(NamedTuple):
    why: list[str | None]  # of each row why it goes; None: it stays
    leaked: Counter[str]  # training rows that are LEAKED, by benchmark; a row may be in several


def clean(rows: Sequence[Record], benchmarks: Mapping[str, Iterable[Record]], threshold: float = 0.8) -> Cleaned:
    """Which rows stay: one of each cluster, the same one in whatever order the rows come.

    Of exact duplicates an evaluation row stays before a training row, then the one of which most is known. If the labels of its evaluation
    rows contradict each other, or where there is none those of its training rows, none stays. Of near duplicates the one with the
    smaller key stays. Near duplicates with other labels all stay: what parts them is what there is to learn. Training rows go that are
    exact or near duplicates of evaluation rows or of rows of `benchmarks`, or whose
    prompt is that of one with a labelled request. ValueError for a threshold that is no similarity.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"near duplicates: a similarity of {threshold} is none; the threshold must be above 0, at most 1")
    why: list[str | None] = [None] * len(rows)
    leaked, apart = Counter[str](), Near(threshold)

    def keep_apart(row: Record, place: str) -> None:
        """Training must not have what this row says, nor what it asks."""
        for text in {row.text, row.asked}:
            apart.add(shape(text, row.pictures), place)

    for name in sorted(benchmarks):
        for row in benchmarks[name]:
            keep_apart(row, name)
    same: dict[tuple, Near] = defaultdict(lambda: Near(threshold))
    for n in sorted(_of_each_key(rows, why), key=lambda n: (rows[n].training, rows[n].key)):
        row = rows[n]
        whole = shape(row.text, row.pictures)
        if row.training and (places := apart.find(whole) | (apart.find(shape(row.prompt, row.pictures)) if row.response else set())):
            why[n] = EVALUATION if places == {EVALUATION} else LEAKED
            leaked.update(places - {EVALUATION})
        elif same[row.training, row.labels].find(whole):
            why[n] = NEAR
        else:
            same[row.training, row.labels].add(whole, NEAR)
            if not row.training:
                keep_apart(row, EVALUATION)
    return Cleaned(why, leaked)


def _of_each_key(rows: Sequence[Record], why: list[str | None]) -> Iterator[int]:
    """The row that stays of those with one key, if any does; the others get their reason."""
    copies: dict[bytes, list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        copies[row.key].append(n)
    for numbers in copies.values():
        judged = [n for n in numbers if not rows[n].training] or numbers  # what training says changes no evaluation
        if any({"safe", "unsafe"} <= set(line) for line in zip(*(rows[n].labels for n in judged), strict=True)):
            for n in numbers:
                why[n] = CONFLICT if n in judged else EVALUATION
            continue
        first = min(numbers, key=lambda n: (rows[n].training, -rows[n].known, rows[n].place))
        for n in numbers:
            why[n] = EXACT if rows[n].training == rows[first].training else EVALUATION
        why[first] = None
        yield first


class Shape(NamedTuple):
    """A text beside its pictures as it is compared."""

    text: str
    pictures: str
    shingles: set[str]
    sketch: RMinHash


def shape(text: str, pictures: str) -> Shape:
    text = text[:COMPARED]
    found, sketch = shingles(text, pictures), RMinHash(PERMUTATIONS, 1)
    sketch.update(list(found))
    return Shape(text, pictures, found, sketch)


def shingles(text: str, pictures: str = "") -> set[str]:
    """A text shorter than a shingle is one itself. Texts beside other pictures share none, so they are never near."""
    return {pictures + text[start : start + SHINGLE] for start in range(max(len(text) - SHINGLE + 1, 1))}


class Near:
    """Texts, each with a value, found by what is near."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._index = RMinHashLSH(threshold, PERMUTATIONS, bands(threshold))
        self._entries: list[tuple[str, str, RMinHash, str]] = []  # without shingles, which take far more room than their text

    def add(self, new: Shape, value: str) -> None:
        self._index.insert(len(self._entries), new.sketch)
        self._entries.append((new.text, new.pictures, new.sketch, value))

    def find(self, own: Shape) -> set[str]:
        """The values of texts whose similarity is at least the threshold."""
        estimates = ((own.sketch.jaccard(self._entries[number][2]), -number) for number in self._index.query(own.sketch))
        values = set()
        for _, number in heapq.nlargest(CHECKED, (one for one in estimates if one[0] >= self._threshold - SLACK)):
            text, pictures, _, value = self._entries[-number]
            if value not in values and jaccard(own.shingles, shingles(text, pictures)) >= self._threshold:
                values.add(value)
        return values


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def bands(threshold: float) -> int:
    """Bands of the signature, as few as find a pair at the threshold with probability FOUND."""
    numbers = [count for count in range(1, PERMUTATIONS + 1) if PERMUTATIONS % count == 0]
    found = (count for count in numbers if 1 - (1 - threshold ** (PERMUTATIONS // count)) ** count >= FOUND)
    return next(found, PERMUTATIONS)
