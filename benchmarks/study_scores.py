"""The study's held-out rows from its files, what is measured of them, and differences of two systems with their intervals.

Scores are those of pgjax/evaluation/metrics.py; an answer without a verdict or a score is wrong, at the wrong end.
P rows, B weightings of them.
"""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np

from pgjax.evaluation.metrics import LEVEL, auroc, binary

Files = dict[str, list[dict]]  # an experiment's files by run, in the order of their seeds
Rows = dict[str, np.ndarray]  # columns of the rows that a run judged, in the order of their ids; NaN for null
System = dict[int, Rows]  # by seed
Measure = Callable[[Rows, np.ndarray], np.ndarray]  # of rows under weights [B, P]: [B]

DRAWS = 2000


def load(folder: Path) -> dict[str, Files]:
    """A form's files by experiment."""
    found: dict[str, Files] = {}
    ones = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*.json"))]
    for one in sorted(ones, key=lambda one: one["seed"]):
        found.setdefault(one["experiment"], {}).setdefault(one["run"], []).append(one)
    return found


def rows(one: dict, moment: str = "after") -> Rows:
    about = {name: one["after"][name] for name in ("id", "group", "unsafe", "category", "named_rows") if name in one["after"]}
    columns = about | one[moment]
    order, named = np.argsort(columns["id"]), columns.pop("named_rows", [])
    found = {}
    for name, column in columns.items():
        column_P = np.array(column, None if name in ("id", "group", "category") else float)
        if name.startswith("naming"):  # of the named rows alone
            column_P = np.full(len(order), np.nan)
            column_P[named] = np.array(column, float)
        found[name] = column_P[order]
    return found


def system(files: Iterable[dict], moment: str = "after") -> System:
    return {one["seed"]: rows(one, moment) for one in files}


def unsafe_auroc(rows: Rows, weight_BP: np.ndarray) -> np.ndarray:
    gold_P = rows["unsafe"] > 0
    answered_P = ~np.isnan(rows["said"]) & ~np.isnan(rows["score"])
    return auroc(gold_P, np.where(answered_P, rows["score"], np.where(gold_P, -np.inf, np.inf)), weight_BP)


def unsafe_f1(rows: Rows, weight_BP: np.ndarray) -> np.ndarray:
    gold_P = rows["unsafe"] > 0
    return binary(gold_P, np.where(np.isnan(rows["said"]), ~gold_P, rows["said"] > 0), weight_BP)["f1"]


def of_source(source: str, rows: Rows, weight_BP: np.ndarray) -> np.ndarray:
    """AUROC of a source's rows."""
    own_P = np.array([source_of(id) == source for id in rows["id"]])
    return unsafe_auroc({name: column_P[own_P] for name, column_P in rows.items()}, weight_BP[:, own_P])


def source_of(id: str) -> str:
    return id.rpartition("-")[0]


def of_kind(kinds: tuple[str, ...], column: str, rows: Rows, weight_BP: np.ndarray) -> np.ndarray:
    """Mean of a column over the rows whose category is of these kinds, NaN without any. A listed id that is right although the policy
    lacks the category counts as detected, and has no name to measure; as metrics.summarise has it."""
    value_P, own_P = rows[column], np.isin(rows["category"], kinds)
    if column == "ood_detected":
        value_P = np.maximum(value_P, rows["category_right"])
    elif column.startswith("naming"):
        own_P = own_P & (rows["category_right"] == 0) & ~np.isnan(value_P)
    total_B = weight_BP[:, own_P].sum(1)
    return np.where(total_B > 0, weight_BP[:, own_P] @ value_P[own_P] / np.maximum(total_B, 1), np.nan)


def once(rows: Rows, measure: Measure) -> float:
    return float(measure(rows, np.ones((1, len(rows["id"]))))[0])


@cache
def draws(groups: tuple[str, ...]) -> np.ndarray:
    """Weights [DRAWS, P] of rows whose groups are drawn with replacement."""
    number_P = np.unique(groups, return_inverse=True)[1]
    count = number_P.max() + 1
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS)[:, number_P].astype(float)


def difference(own: System, base: System, measure: Measure) -> tuple[float, float, float]:
    """Of `own` less `base`, with the ends of its interval. ValueError where they did not judge the same rows, or share no seed."""
    [*only], shared = own.values(), own.keys() & base.keys()
    pairs = [(only[0], other) for other in base.values()] if len(only) == 1 else [(own[seed], base[seed]) for seed in sorted(shared)]
    if not pairs:
        raise ValueError("two systems have no seed in common")
    first = pairs[0][1]
    if any(not np.array_equal(side[name], first[name]) for pair in pairs for side in pair for name in ("id", "group", "unsafe")):
        raise ValueError("two systems that are compared judged different rows")
    of = lambda weight_BP: np.mean([measure(a, weight_BP) - measure(b, weight_BP) for a, b in pairs], axis=0)  # noqa: E731
    value, value_B = float(of(np.ones((1, len(first["id"]))))[0]), of(draws(tuple(first["group"])))
    if np.isnan(value):
        return value, value, value
    low, high = np.nanquantile(value_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)
