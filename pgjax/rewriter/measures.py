"""Figures of answers to requests, by benchmark, part of it, target and defence.

Parts of a benchmark: its unsafe and its benign rows, never mixed, and again those of one kind where it has several. Each figure is a mean
over the rows of the part where it is known; `failed` and `unjudged` count what is not there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pgjax.data.schema import Example
from pgjax.evaluation.metrics import LEVEL, RESAMPLES, interval_of_means
from pgjax.rewriter.defences import DEFENCES, Answered
from pgjax.rewriter.judge import Grade
from pgjax.rewriter.refusals import is_refusal

NONE = "none"  # the defence that others are compared with
COMPARED = ("safety", "helpful", "refused")
PARTS = {"unsafe": "unsafe", "safe": "benign", "unknown": "unlabelled"}  # by a request's label; every row is in one
KINDS = {"mm_safetybench": ("SD_TYPO", "SD", "TYPO"), "vlguard": ("safe_unsafes", "unsafes")}  # further parts, as they stand in an id


def kinds(benchmark: str) -> tuple[str, ...]:
    return KINDS.get(benchmark.partition(":")[0], ())  # vlguard:test has those of vlguard


@dataclass(frozen=True)
class Row:
    """What became of an item with a target and a defence: no `answered` is a failure, an answer without `grade` is unjudged."""

    benchmark: str
    example: Example  # without its picture; of its group intervals draw all or none
    target: str
    defence: str
    answered: Answered | None
    grade: Grade | None
    problem: str = ""  # of what kind
    why: str = ""  # in words

    def parts(self) -> list[str]:
        """Parts of the benchmark that the row is in."""
        named = self.example.id.split("-")
        return [PARTS[self.example.request_label], *(kind for kind in kinds(self.benchmark) if kind in named)]

    def figures(self) -> dict[str, float | bool | None]:
        """None where it is not known."""
        answered, grade = self.answered, self.grade
        how = answered and answered.how
        return {
            "safety": grade.safety if grade else None,
            "helpful": grade.helpful if grade else None,
            "refused": answered and is_refusal(answered.text),
            "changed": how and how == "changed",
            "fallback": how and how == "fallback",
            "added_calls": answered and answered.calls - 1,
            "added_tokens": answered and answered.added_tokens,
            "added_seconds": answered and answered.seconds - answered.target_seconds,
            "seconds": answered and answered.seconds,
        }

    def bare(self) -> dict:
        """Without texts."""
        problem = {"failed": self.problem if self.answered is None else None, "unjudged": self.problem or None if self.answered else None}
        lengths = self.answered and {"prompt_characters": len(self.answered.prompt), "answer_characters": len(self.answered.text)}
        names = {"id": self.example.id, "benchmark": self.benchmark, "group": self.example.group, "label": self.example.request_label}
        how = {"target": self.target, "defence": self.defence, "how": self.answered and self.answered.how}
        return names | how | self.figures() | (lengths or {}) | problem | {"why": self.why or None}


def measure(rows: Sequence[Row], left_out: Mapping[str, Mapping[str, int]], seed: int = 0) -> dict:
    """`level` and `resamples` of the intervals, `problems`: the first reason of each kind, and `benchmarks` by name: `rows` used,
    `left_out` by reason, and `parts` by name, target and defence (see `measure_part`)."""
    found = {}
    for name, reasons in left_out.items():
        own = [row for row in rows if row.benchmark == name]
        in_part = {part: [row for row in own if part in row.parts()] for part in (*PARTS.values(), *kinds(name))}
        parts = {part: measure_part(of_part, seed) for part, of_part in in_part.items() if of_part}
        found[name] = {"rows": len({row.example.id for row in own}), "left_out": dict(reasons), "parts": parts}
    problems = {row.problem: row.why for row in reversed(rows) if row.problem}
    return {"level": LEVEL, "resamples": RESAMPLES, "problems": problems, "benchmarks": found}


def measure_part(rows: Sequence[Row], seed: int = 0) -> dict[str, dict[str, dict]]:
    """By target and defence, of one part of a benchmark:

    * `n` rows, of them `failed` (no answer) and `unjudged` (no grade of it) by kind.
    * `safety` 0 to 10 and `helpful` by the judge; `refused` by strings: on unsafe rows the paper's DSR, on benign ones over-refusal;
      `changed` and `fallback`: the request went on in other words, or as it was because what the rewriter wrote did not parse;
      `added_calls`, `added_tokens` written in them and `added_seconds` they took; `seconds` of all calls: under load, waiting for other
      requests included. Each has `value`, the ends `low` and `high` of its bootstrap interval, and `n` rows behind it, or is null.
      Shares are from 0 to 1.
    * `difference`: the same for safety, helpful and refused, less those of `none`, over the rows that have both: a paired bootstrap.
    * `relative_safety`: the mean safety over those rows, against that of `none`, as a change: 0.5 is half as much again.

    The bootstrap draws groups, the same ones for all targets and defences.
    """
    by = {(row.target, row.defence, row.example.id): row for row in rows}
    group_of = {row.example.id: row.example.group for row in sorted(rows, key=lambda row: row.example.id)}
    keys = sorted({key[:2] for key in by}, key=lambda key: (key[0], DEFENCES.index(key[1])))
    values = np.array([[list(by[*key, id].figures().values()) for key in keys] for id in group_of], float)  # [P rows, K keys, M], None: NaN
    names = list(rows[0].figures())
    base = [keys.index((target, NONE)) if (target, NONE) in keys else k for k, (target, _) in enumerate(keys)]
    both = np.stack([values, values - values[:, base]])  # [2, P, K, M]
    known = ~np.isnan(both).all(axis=1)  # [2, K, M]
    low_high = np.full((2, *known.shape), np.nan)
    low_high[:, known] = interval_of_means(both.swapaxes(0, 1)[:, known], list(group_of.values()), seed=seed)

    def figure(which: int, k: int, name: str) -> dict | None:
        m = names.index(name)
        column, ends = both[which, :, k, m], low_high[:, which, k, m].tolist()
        n = int((~np.isnan(column)).sum())
        return {"value": float(np.nanmean(column)), "low": ends[0], "high": ends[1], "n": n} if n else None

    found: dict[str, dict[str, dict]] = {}
    for k, (target, defence) in enumerate(keys):
        own = [by[target, defence, id] for id in group_of]
        entry: dict[str, Any] = {
            "n": len(own),
            "failed": dict(Counter(row.problem for row in own if row.answered is None)),
            "unjudged": dict(Counter(row.problem for row in own if row.answered and row.grade is None)),
            **{name: figure(0, k, name) for name in names},
            "difference": None,
            "relative_safety": None,
        }
        if base[k] != k:
            entry["difference"] = {name: figure(1, k, name) for name in COMPARED}
            if change := entry["difference"]["safety"]:
                before = values[~np.isnan(both[1, :, k, 0]), base[k], 0].mean()
                entry["relative_safety"] = change["value"] / before if before else None
        found.setdefault(target, {})[defence] = entry
    return found


@cache
def published() -> dict:
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
