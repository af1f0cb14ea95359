"""What an evaluation found on public benchmarks, as one JSON object, and the numbers that were published on the same sets.

Two F1 conventions, in fields of their own and never compared with each other: `f1_unsafe` of the unsafe class, `f1_weighted` the mean of
both classes' F1 by support (what the published tables appear to report, PAPERS A12). Figures are shares from 0 to 1, null where nothing
defines them; published numbers are percentages as printed.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from pgjax.data.schema import CATEGORY_OOD, UNSAFE
from pgjax.evaluation.metrics import LEVEL, RESAMPLES, Rows, labelled, summarise, table

LINES = ("request", "response")
HELD_OUT, PROBES = OWN = "held_out", "probes"  # a run's held-out rows, and harmless requests of ours: in no average
F1 = {"f1_unsafe": "f1", "f1_weighted": "weighted_f1"}  # our key -> the one of metrics.py
BINARY = F1 | {name: name for name in ("precision", "recall", "fpr", "accuracy")}
OOD = {"natural": "_masked", "masked": "_masked", "never_seen": "_never_seen"}  # in the first pass nothing is masked: `_masked` is natural


class Evaluated(NamedTuple):
    """One benchmark with its answers. Rows whose risk the taxonomy lacks (natural OOD) belong in the first pass only."""

    name: str
    rows: Rows  # the whole policy in the prompt
    hidden: Rows | None  # a second pass, the gold category hidden from half of the rows; None where it was not made
    lines: tuple[str, ...]  # of LINES, what the benchmark labels
    left_out: Mapping[str, int]  # rows that were not used, by reason
    seconds: float


def summary(sets: Sequence[Evaluated], resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """`level` and `resamples` of the intervals, `benchmarks` by name, and `averages` over them (see `averages`).

    A benchmark has, at the top, the figures of line `line`: requests, or responses where only they are labelled.

    * `n` rows of known label, `unsafe` among them, `n_parsed` answered in format; `f1_unsafe`, `f1_weighted`, `precision`, `recall`,
      `fpr`, `accuracy`, and `auroc` by label scores: an answer out of format counts as wrong. `all_unsafe`: there are no safe rows, so
      that f1_unsafe is 2r / (1 + r) of the recall r, which is the figure to read.
    * `ci`: ends of the bootstrap interval by figure. `parsed_only`: both F1 with answers out of format left out.
    * `response`: the same for responses where both lines are labelled, else null.
    * `category`: `accuracy` over `n` rows whose gold category the prompt's policy lists, and `ci`.
    * `ood`: was a risk that the policy lacks answered by a name of the guard's own, and how near is the name? Three kinds of OOD rows,
      each against the rows that are none: `natural` (the taxonomy lacks it), `masked` (hidden from the prompt) and `never_seen` (hidden
      in training too), the last two null without a second pass. `n` rows, `positives` among them, the binary figures with OOD the
      positive class (`f1` for `f1_unsafe`), every measure of `Rows.naming` over the `naming_n` OOD rows whose gold node has phrases, 0
      for those answered otherwise, and `ci`.
    * `rows` in all, `left_out` by reason, `seconds`.

    Raises ValueError for two sets of one name and for a set that labels nothing.
    """
    names = [one.name for one in sets]
    if len(set(names)) < len(names) or not all(one.lines and set(one.lines) <= set(LINES) for one in sets):
        raise ValueError(f"summary: benchmarks need names of their own and labels on {' or '.join(LINES)}; got {', '.join(names)}")
    benchmarks = {one.name: _benchmark(one, resamples, seed) for one in sets}
    return {"level": LEVEL, "resamples": resamples, "benchmarks": benchmarks, "averages": averages(benchmarks)}


def _benchmark(one: Evaluated, resamples: int, seed: int) -> dict:
    found = table(one.rows, resamples, seed)
    main = "request" if "request" in one.lines else "response"
    ood = dict.fromkeys(OOD)
    if one.hidden is not None:
        hidden = table(one.hidden, resamples, seed)
        ood = {kind: _ood(one.hidden, suffix, hidden) for kind, suffix in OOD.items()}
    return {
        "line": main,
        **_binary(one.rows, main, found),
        "response": _binary(one.rows, "response", found) if set(one.lines) == set(LINES) else None,
        "category": {"n": found["counts"]["category_n"], **_picked(found, {"accuracy": "category_accuracy"})},
        "ood": ood | {"natural": _ood(one.rows, OOD["natural"], found)},
        "rows": found["counts"]["n"],
        "left_out": dict(one.left_out),
        "seconds": one.seconds,
    }


def _binary(rows: Rows, line: str, found: dict) -> dict:
    gold = rows.gold
    counted_P = labelled(gold, line) & (np.asarray(gold.weight_P) > 0)
    parsed = summarise(rows._replace(gold=gold.replace(weight_P=np.where(rows.verdict.parsed, gold.weight_P, 0))))
    entry = _picked(found, {key: f"{line}_{name}" for key, name in (BINARY | {"auroc": "auroc"}).items()})
    return {
        "n": int(counted_P.sum()),
        "unsafe": int((counted_P & (np.asarray(getattr(gold, f"{line}_P")) == UNSAFE)).sum()),
        "n_parsed": int(parsed[f"{line}_n"]),
        "all_unsafe": entry["fpr"] is None and entry["recall"] is not None,
        "parsed_only": {key: parsed.get(f"{line}_{name}") for key, name in F1.items()},
        **entry,
    }


def _ood(rows: Rows, suffix: str, found: dict) -> dict:
    never_seen_P = np.asarray(rows.gold.never_seen_P, bool)
    kind_P = (np.asarray(rows.gold.category_P) == CATEGORY_OOD) & (never_seen_P if suffix == "_never_seen" else ~never_seen_P)
    counts = {
        "n": found["counts"][f"ood{suffix}_n"],
        "positives": int((kind_P & (np.asarray(rows.gold.weight_P) > 0)).sum()),
        "naming_n": found["scores"].get(f"naming{suffix}", {"rows": 0})["rows"],
    }
    names = {key.replace("f1_unsafe", "f1"): f"ood{suffix}_{name}" for key, name in BINARY.items()}
    return counts | _picked(found, names | {name: name + suffix for name in rows.naming})


def _picked(found: dict, names: Mapping[str, str]) -> dict:
    """Scores of such a table of metrics.py by our key, and their intervals in `ci`."""
    undefined = dict.fromkeys(("value", "low", "high"))
    scores = {key: found["scores"].get(name, undefined) for key, name in names.items()}
    ends = {key: None if score["low"] is None else [score["low"], score["high"]] for key, score in scores.items()}
    return {key: score["value"] for key, score in scores.items()} | {"ci": ends}


def averages(benchmarks: Mapping[str, dict]) -> dict:
    """For requests and responses and both F1: `all`, over every public set that defines both, and `paper`, over the sets of the published
    average.

    Each is as `average` gives it, null where no set, or not every one of the paper's, is there. Rows weight `all` by their number here,
    `paper` by the numbers that give the published averages, so that a part of a set does not change what is compared.
    """
    out: dict[str, dict] = {}
    for line in LINES:
        entries = {name: entry for name, one in benchmarks.items() if name not in OWN and (entry := line_of(one, line))}
        entries = {name: entry for name, entry in entries.items() if all(entry[key] is not None for key in F1)}
        rows, published_rows = {name: entry["n"] for name, entry in entries.items()}, published()["rows"][line]
        out[line] = {"all": {}, "paper": {}}
        for key in F1:
            values = {name: entry[key] for name, entry in entries.items()}
            has_all = published_rows.keys() <= values.keys()
            out[line]["all"][key] = average(values, rows) if values else None
            out[line]["paper"][key] = average({name: values[name] for name in published_rows}, published_rows) if has_all else None
    return out


def line_of(benchmark: dict, line: str) -> dict | None:
    """The figures of a benchmark on that line, null where it has no such labels."""
    return benchmark if benchmark["line"] == line else benchmark.get(line)


def average(values: Mapping[str, float], rows: Mapping[str, int]) -> dict:
    """`mean` over sets, `row_weighted` mean, and the `sets`. Not empty."""
    total = sum(rows[name] for name in values)
    weighted = sum(rows[name] * value for name, value in values.items()) / total
    return {"mean": sum(values.values()) / len(values), "row_weighted": weighted, "sets": list(values)}


@cache
def published() -> dict:
    """published.yaml: `rows` by line and set, and `tables` with `source`, `convention`, `columns`, and `models` by name and column."""
    found = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    for one in found["tables"].values():
        one["models"] = {name: dict(zip(one["columns"], values, strict=True)) for name, values in one["models"].items()}
    return found
