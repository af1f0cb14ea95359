"""Which rows a training set takes: so many of a modality, label and category, from what there is. Which of equals is settled by a hash."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pgjax.data.dataset import Target


class Entry(NamedTuple):
    """A row of the pool without its content."""

    number: int  # in the pool
    order: tuple[int, bytes]  # hashes of its group and of itself: rows are taken in this order
    source: str
    split: str
    modality: str
    unsafe: bool
    category: str  # id of the top level, a name outside the policy, "none" or "unknown"


class Cell(NamedTuple):
    """A kind of rows."""

    split: str
    modality: str
    unsafe: bool
    category: str


class Plan(NamedTuple):
    chosen: list[Entry]  # in the order of the pool
    available: Counter[Cell]
    taken: Counter[Cell]


def cell_of(entry: Entry) -> Cell:
    return Cell(entry.split, entry.modality, entry.unsafe, entry.category)


def level(wanted: int, supply: Mapping[str, int]) -> dict[str, int]:
    """`wanted` rows from kinds with so many each, in equal parts as far as they go: the small ones whole, the rest from the others."""
    shares, left = {}, wanted
    for done, kind in enumerate(sorted(supply, key=lambda kind: (supply[kind], kind))):
        shares[kind] = min(supply[kind], left // (len(supply) - done))
        left -= shares[kind]
    return shares


def balance(entries: Sequence[Entry], targets: Sequence[Target], at_most: Mapping[str, int]) -> Plan:
    """Rows for the targets. What a category lacks the others of its label make up, what a label lacks is lacking."""
    by_cell: dict[Cell, list[Entry]] = defaultdict(list)
    for entry in _limited(entries, at_most):
        by_cell[cell_of(entry)].append(entry)
    for rows in by_cell.values():
        rows.sort(key=lambda entry: entry.order)
    available, taken = Counter({cell: len(rows) for cell, rows in by_cell.items()}), Counter[Cell]()
    for target in targets:
        cells = {cell: n for cell, n in available.items() if (cell.split, cell.modality) == (target.split, target.modality)}
        taken.update(_quota(target, cells))
    chosen = [entry for cell, n in taken.items() for entry in by_cell[cell][:n]]
    return Plan(sorted(chosen), available, taken)


def _quota(target: Target, cells: Mapping[Cell, int]) -> dict[Cell, int]:
    """How many rows of each cell a target takes."""
    supply = {label: sum(n for cell, n in cells.items() if cell.unsafe == label) for label in (True, False)}
    quota = {}
    for label, wanted in wanted_of(target, supply).items():
        kinds = {cell.category: size for cell, size in cells.items() if cell.unsafe == label}
        shares = (level if target.even and label else _in_proportion)(min(wanted, supply[label]), kinds)
        quota |= {Cell(target.split, target.modality, label, category): share for category, share in shares.items()}
    return quota


def wanted_of(target: Target, supply: Mapping[bool, int]) -> dict[bool, int]:
    """How many unsafe (True) and safe rows a target wants; where it does not say, as many as come."""
    whole = sum(supply.values())
    share = target.unsafe if target.unsafe is not None else supply[True] / whole if whole else 0
    unsafe = round(target.rows * share)
    return {True: unsafe, False: target.rows - unsafe}


def _in_proportion(wanted: int, supply: Mapping[str, int]) -> dict[str, int]:
    """Shares by size, whole numbers by the largest remainders."""
    total = sum(supply.values())
    exact = {kind: wanted * size / total for kind, size in supply.items()}
    shares = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: (shares[kind] - exact[kind], kind))
    for kind in by_remainder[: wanted - sum(shares.values())]:
        shares[kind] += 1
    return shares


def _limited(entries: Sequence[Entry], at_most: Mapping[str, int]) -> list[Entry]:
    """Of limited sources the first rows of the training split in the order of their hashes."""
    kept, seen = [], Counter[str]()
    for entry in sorted(entries, key=lambda entry: entry.order):
        limited = entry.split == "train" and entry.source in at_most
        if not limited or seen[entry.source] < at_most[entry.source]:
            kept.append(entry)
            seen[entry.source] += limited
    return kept
