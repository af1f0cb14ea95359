"""The data card of a dataset: what it is made of, from where, under which licences, by which command."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pgjax import __version__
from pgjax.data.balance import Plan, wanted_of
from pgjax.data.dataset import Dataset
from pgjax.data.sources.registry import Source
from pgjax.data.vote import Votes, report
from pgjax.endpoint import command_line
from pgjax.pages.tables import Table, markdown

LABEL = {True: "unsafe", False: "safe"}


@dataclasses.dataclass
class Counts:
    """What became of the rows of a source."""

    rows: int = 0
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)  # broken, by kind
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)  # whole, but of no use, by reason
    chosen: Counter[str] = dataclasses.field(default_factory=Counter)  # by split
    lost: float = 0.0  # share of the files that cannot be read on


@dataclasses.dataclass
class Compared:
    """What became of a benchmark's rows."""

    rows: int = 0  # that training rows were compared with
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)  # of no use, by reason
    leaked: int = 0  # training rows that it holds


def new_card(
    config: Dataset, sources: Mapping[str, Source], counts: Mapping[str, Counts], plan: Plan, compared: Mapping[str, Compared], votes: Votes
) -> dict[str, Any]:
    """All but what is known when the rows are written."""
    kinds = [cell._asdict() | {"available": n, "taken": plan.taken[cell]} for cell, n in sorted(plan.available.items())]
    targets = []
    for target in config.targets:
        mine = [kind for kind in kinds if (kind["split"], kind["modality"]) == (target.split, target.modality)]
        total = lambda label, key, mine=mine: sum(kind[key] for kind in mine if kind["unsafe"] == label)  # noqa: E731
        for label, wanted in wanted_of(target, {label: total(label, "available") for label in LABEL}).items():
            numbers = {"wanted": wanted, "available": total(label, "available"), "taken": total(label, "taken")}
            short = {"short": wanted - numbers["taken"]}
            targets.append({"split": target.split, "modality": target.modality, "unsafe": label} | numbers | short)
    return {
        "name": config.name,
        "pgjax": __version__,
        "command": command_line(),
        "config": dataclasses.asdict(config),
        "targets": targets,
        "kinds": kinds,
        "sources": {name: {"origin": source.origin, "licence": source.licence} | vars(counts[name]) for name, source in sources.items()},
        "benchmarks": {name: vars(found) for name, found in compared.items()},
        "votes": report(votes),
        "calls": votes.calls,
    }


def tables(card: Mapping[str, Any]) -> list[Table]:
    """First what each target wants and gets; then kinds, sources and votes."""
    listed = lambda counts: ", ".join(f"{name} {n}" for name, n in counts.items()) or "-"  # noqa: E731
    label = lambda row: LABEL[row["unsafe"]]  # noqa: E731
    numbers = lambda row, *keys: tuple(str(row[key]) for key in keys)  # noqa: E731
    targets = [(f"{t['split']} {t['modality']} {label(t)}", *numbers(t, "wanted", "available", "taken", "short")) for t in card["targets"]]
    kinds = [(f"{k['split']} {k['modality']} {label(k)} {k['category']}", *numbers(k, "available", "taken")) for k in card["kinds"]]
    sources = [
        (name, str(s["rows"]), listed(s["rejected"]), listed(s["left_out"]), listed(s["chosen"])) for name, s in card["sources"].items()
    ]
    share = lambda x: "-" if x is None else f"{x:.3f}"  # noqa: E731
    votes = [
        (f"{source} {name}", str(field["rows"]), *(share(field[key]) for key in ("decided", "agreement", "kappa")))
        for source, told in card["votes"].items()
        for name, field in told["fields"].items()
    ]
    judges = [
        (f"{source} {judge}", str(found["unparsed"]), listed(found["failed"]))
        for source, told in card["votes"].items()
        for judge, found in told["judges"].items()
    ]
    benchmarks = [(name, str(of["rows"]), listed(of["left_out"]), str(of["leaked"])) for name, of in card["benchmarks"].items()]
    every = [
        ("Targets", ("rows", "wanted", "available", "taken", "short"), targets, "Unsafe is a row whose request or response is."),
        ("Kinds", ("rows", "available", "taken"), kinds, ""),
        ("Sources", ("source", "rows", "broken", "left out", "chosen"), sources, ""),
        ("Benchmarks", ("benchmark", "rows", "left out", "training rows in it"), benchmarks, "Those are left out; one may be in several."),
        ("Votes", ("source and field", "rows", "decided", "agreement", "kappa"), votes, "Of pairs of judges; Fleiss' kappa."),
        ("Judges", ("source and judge", "unparsed", "failed"), judges, "Rows of which this judge said nothing; a later build asks again."),
    ]
    return [Table("", *table) for table in every if table[2]]


def markdown_card(card: Mapping[str, Any]) -> str:
    facts = [f"{name}: {card[name]}" for name in ("command", "pgjax", "hash", "seconds")]
    origins = [(name, source["licence"], source["origin"]) for name, source in card["sources"].items()]
    where = Table("", "Where the sources are from", ("source", "licence", "origin"), origins, "")
    return f"# {card['name']}\n\n{markdown(facts, [*tables(card), where])}"
