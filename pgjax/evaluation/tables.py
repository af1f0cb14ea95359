"""A summary of benchmarks (evaluation/summary.py) as text, Markdown or one HTML page, beside what others published on the same sets.

Published numbers stand only beside our figure of the same convention, and only on sets that were evaluated.
"""

from collections.abc import Iterator, Mapping, Sequence

from pgjax.evaluation.summary import F1, LINES, OOD, line_of, published
from pgjax.pages.charts import bars, text
from pgjax.pages.page import facts, grid, warnings, whole_page
from pgjax.pages.samples import sample_tables, wrong_and_right
from pgjax.pages.tables import Table, markdown, markup, plain
from pgjax.taxonomy import Taxonomy

UNSAFE, WEIGHTED = "F1 unsafe", "F1 weighted"
CONVENTIONS = {
    "weighted": "weighted F1, the mean of both classes' F1 by support (the paper prints F1; inferred from its values)",
    "unsafe": "F1 of the unsafe class",
    "accuracy": "accuracy over rows whose gold category the policy lists; guards with a taxonomy of their own were given other policies",
    "unstated": "F1, the paper does not say of which kind; hence both of ours",
    "bonus": "the naming bonus of the reward alone, by the published thresholds 0.7 and 0.6, mean over OOD rows with 0 for misses (ours at "
    "most 50; the paper states no scale, and its encoder is another)",
}
FIGURES = {  # of OOD
    "n": "rows",
    "positives": "OOD rows",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "fpr": "FPR",
    "naming": "naming, similarity",
    "naming_second": "naming, another embedder",
    "naming_mrr": "naming, mean 1 / rank",
    "naming_top1": "naming, rank 1",
    "naming_bonus": "naming, bonus of the reward",
}
ROWS = "Rows and time"
FAILURES = "an answer out of format counts as wrong"


def percent(entry: Mapping, key: str, digits: int = 1, interval: bool = True) -> str:
    """A share as a percentage, with its interval where there is one."""
    if entry[key] is None:
        return "–"
    ends = entry.get("ci", {}).get(key) if interval else None
    return f"{100 * entry[key]:.{digits}f}" + (f" ({100 * ends[0]:.{digits}f}–{100 * ends[1]:.{digits}f})" if ends else "")


def tables(summary: dict, guard: str) -> Iterator[Table]:
    """Every table that has a row; `guard` is what to call it."""
    benchmarks = summary["benchmarks"]
    for line in LINES:
        entries = {name: entry for name, one in benchmarks.items() if (entry := line_of(one, line))}
        if entries:
            yield from _line(line, entries, summary, guard)
    listed = {name: one["category"] for name, one in benchmarks.items() if one["category"]["n"]}
    if listed:
        rows = [(name, str(entry["n"]), percent(entry, "accuracy")) for name, entry in listed.items()]
        note = f"Percent. Right is the id of an accepted category among rows whose gold category the policy lists; {FAILURES}."
        yield Table("Categories", "Categories of the policy", ("benchmark", "n", "accuracy"), rows, note)
        yield from _beside("Categories", "Category accuracy", "category", {guard: {name: one["accuracy"] for name, one in listed.items()}})
    yield from _ood(benchmarks, guard)
    yield from _obedience(summary.get("obedience", {}))
    yield from _probes(summary.get("probes", {}))
    seen = lambda name: "unknown" if summary.get("overlap") is None else str(summary["overlap"].get(name, 0))  # noqa: E731
    used = [(name, str(one["rows"]), seen(name), _reasons(one["left_out"]), f"{one['seconds']:.0f}") for name, one in benchmarks.items()]
    note = "Rows of the first pass; seconds of both. trained on: rows of the set that this guard has learnt from."
    yield Table("Rows", ROWS, ("benchmark", "rows", "trained on", "left out", "seconds"), used, note)


def _obedience(found: Mapping[str, dict]) -> Iterator[Table]:
    if found:
        rows = [
            (f"{name}, {condition}", str(one["n"]), percent(one | {"ci": {"obeyed": one["ci"]}}, "obeyed"), *map(str, one["unsafe"]))
            for name, conditions in found.items()
            for condition, one in conditions.items()
        ]
        note = "Percent of the n rows that a changed policy asks something of, whose answer follows it. permuted: categories in another "
        note += "order under other ids, renamed: called by synonyms, without descriptions; what was named is named again. hidden: all that "
        note += "would be right is missing, foreign: harmless topics stand instead; what is called unsafe gets no listed id. "
        note += "unsafe: of all unsafe rows of a known category, those called so before and after."
        yield Table("Policy", "Obedience to the policy", ("benchmark", "n", "obeyed", "unsafe before", "after"), rows, note)


def _probes(found: Mapping[str, dict]) -> Iterator[Table]:
    if found:
        cell = lambda one: percent(one | {"ci": {"value": [one["low"], one["high"]]}}, "value")  # noqa: E731
        rows = [(kind, str(one["pairs"]), *(cell(one[name]) for name in ("fpr", "twin_fpr", "gap"))) for kind, one in found.items()]
        note = "Percent of harmless requests that are flagged: those that name an identity, speak up against prejudice or sound dangerous, "
        note += "and their neutral twins. Probes of our own, mild; they are few. An answer out of format counts as flagged."
        yield Table("Probes", "False positives on probes", ("kind", "pairs", "probes", "twins", "gap"), rows, note)


def _reasons(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "–"


def _line(line: str, entries: Mapping[str, dict], summary: dict, guard: str) -> Iterator[Table]:
    title, level = f"{line.capitalize()}s", f"{100 * summary['level']:.0f}%"
    plain = lambda entry, *keys: [percent(entry, key, interval=False) for key in keys]  # noqa: E731
    rows = []
    for name, one in entries.items():
        counts = name + " *" * one["all_unsafe"], str(one["n"]), str(one["unsafe"]), str(one["n"] - one["n_parsed"])
        shown = percent(one, "f1_unsafe"), *plain(one, "precision"), percent(one, "recall"), percent(one, "fpr")
        rows.append((*counts, *shown, *plain(one, "accuracy", "auroc")))
    columns = ("benchmark", "n", "unsafe", "no parse", UNSAFE, "precision", "recall", "FPR", "accuracy", "AUROC")
    note = f"Percent, unsafe the positive class; {FAILURES}. In brackets: {level} bootstrap intervals, drawn by groups of rows."
    star = " * All rows are unsafe: F1 is then 2r / (1 + r) of the recall r; read the recall."
    yield Table(title, f"{title}, scores", columns, rows, note + star * any(one["all_unsafe"] for one in entries.values()))

    rows = [(name, *plain(one, *F1), *plain(one["parsed_only"], *F1)) for name, one in entries.items()]
    means = summary["averages"][line]
    for kind, label in {"all": "all sets", "paper": "the paper's sets"}.items():
        for how, mean in {"mean": "mean", "row_weighted": "row-weighted mean"}.items():
            if any(means[kind].values()):
                rows.append((f"{mean}, {label}", *plain({key: one and one[how] for key, one in means[kind].items()}, *F1), "", ""))
    columns = ("benchmark", UNSAFE, WEIGHTED, f"{UNSAFE}, parsed only", f"{WEIGHTED}, parsed only")
    note = f"Percent. Two conventions, never to be compared with each other; {FAILURES}, and is left out where it says parsed only. "
    note += "Row-weighted: each set counts by its rows; the paper's sets by the rows that give its printed averages."
    if means["all"]["f1_unsafe"]:
        note += f" Means over all sets: of {', '.join(means['all']['f1_unsafe']['sets'])}."
    yield Table(title, f"{title}, both F1 conventions", columns, rows, note)
    for suffix, key in {"": "f1_weighted", "_unsafe": "f1_unsafe"}.items():
        ours = {name: one[key] for name, one in entries.items()}
        if means["paper"][key]:
            ours["average"] = means["paper"][key]["row_weighted"]
        yield from _beside(title, f"{title}, {WEIGHTED if key == 'f1_weighted' else UNSAFE}", line + suffix, {guard: ours})


def _ood(benchmarks: Mapping[str, dict], guard: str) -> Iterator[Table]:
    has = {name: [kind for kind in OOD if one["ood"][kind] and one["ood"][kind]["positives"]] for name, one in benchmarks.items()}
    shown = [kind for kind in OOD if any(kind in kinds for kinds in has.values())]
    rows = []
    for name, kinds in has.items():
        for key, label in FIGURES.items():
            cells = [_figure(benchmarks[name]["ood"][kind], key) if kind in kinds else "–" for kind in shown]
            if any(cell != "–" for cell in cells):
                rows.append((f"{name}, {label}", *cells))
    if not rows:
        return
    note = f"Percent, OOD the positive class among rows of known category; {FAILURES}. natural: the taxonomy lacks the risk, masked: its "
    note += "category is hidden from the prompt, never seen: hidden in training too. naming: means over OOD rows, 0 for those answered "
    note += "otherwise, of the similarity to the gold category's phrases and of the rank that it gives the gold category among all."
    yield Table("OOD", "OOD detection and naming", ("benchmark", *(kind.replace("_", " ") for kind in shown)), rows, note)
    masked = {name: benchmarks[name]["ood"]["masked"] for name, kinds in has.items() if "masked" in kinds}
    ours = lambda key: {name: one.get(key) for name, one in masked.items()}  # noqa: E731
    both = {f"{guard}, F1 OOD": ours("f1"), f"{guard}, {WEIGHTED}": ours("f1_weighted")}
    yield from _beside("OOD", "OOD detection, masked", "ood_detection", both)
    yield from _beside("OOD", "OOD naming, masked", "ood_description", {guard: ours("naming_bonus")})


def _figure(entry: Mapping, key: str) -> str:
    if key not in entry:
        return "–"
    return str(entry[key]) if key in ("n", "positives") else percent(entry, key, interval=key in ("f1", "naming"))


def _beside(section: str, title: str, key: str, ours: Mapping[str, Mapping[str, float | None]]) -> Iterator[Table]:
    """Our rows above the published ones, on the columns that any of ours has; nothing where that is none."""
    found = published()["tables"][key]
    columns = [column for column in found["columns"] if any(row.get(column) is not None for row in ours.values())]
    if columns:
        rows = [(name, *(percent({c: row.get(c)}, c, 2) for c in columns)) for name, row in ours.items()]
        for model, values in found["models"].items():
            if any(values[column] is not None for column in columns):
                rows.append((model, *("–" if values[column] is None else f"{values[column]:.2f}" for column in columns)))
        note = f"Percent. Convention: {CONVENTIONS[found['convention']]}; in ours {FAILURES}. "
        note += f"Published: {found['source']}, on the sets as it took them; ours on the rows under {ROWS}."
        note += " average: row-weighted, by the rows that give the printed one." * ("average" in columns)
        yield Table(section, f"{title}, beside published numbers", ("model", *columns), rows, note)


# --- text, Markdown, HTML ----------------------------------------------------------------------------------------------------------


def remarks(summary: dict) -> list[str]:
    """What must be read before any figure."""
    toy = ["A toy or demo model: not a guard."] if summary.get("guard", {}).get("not_a_guard") else []
    if (overlap := summary.get("overlap")) is None:
        seen = ["Overlap with training is unknown: the model's folder has no data/training_rows.npy."]
    else:
        used = ", ".join(f"{name} ({number})" for name, number in overlap.items() if number)
        seen = [f"This guard was trained on rows of {used}; figures of these sets are no fair test."] if used else []
    return toy + seen + [f"Not evaluated: {why}" for why in summary.get("not_evaluated", {}).values()]


def as_text(summary: dict, guard: str = "this guard") -> str:
    """For a terminal: columns aligned."""
    return plain(remarks(summary), tables(summary, guard))


def as_markdown(summary: dict, guard: str = "this guard") -> str:
    """Tables for a README, headings of the third level."""
    return markdown(remarks(summary), tables(summary, guard))


def as_html(summary: dict, guard: str, about: Mapping[str, object], samples: str = "") -> str:
    """A whole page without scripts: charts, tables, and `samples` (markup of `sample_section`).

    `about` stands on top, names over values.
    """
    header = f"<h1>{text(guard, 200)}</h1>{warnings(remarks(summary))}{facts(about)}"
    sections = {"Charts": grid(charts(summary))} | markup(tables(summary, guard))
    return whole_page(guard, header, sections | {"Samples": samples})


def charts(summary: dict) -> list[str]:
    """Bars by benchmark with intervals; F1 without the sets that are all unsafe."""
    out, benchmarks = [], summary["benchmarks"]
    for line in LINES:
        entries = {name: entry for name, one in benchmarks.items() if (entry := line_of(one, line))}
        mixed = {name: one for name, one in entries.items() if not one["all_unsafe"]}
        out.append(_bars(f"{line.capitalize()}s: F1 of the unsafe class", mixed, "f1_unsafe"))
        out.append(_bars(f"{line.capitalize()}s: recall", entries, "recall"))
        out.append(_bars(f"{line.capitalize()}s: false positive rate", entries, "fpr"))
    for kind in OOD:
        entries = {name: one["ood"][kind] for name, one in benchmarks.items() if one["ood"][kind]}
        out.append(_bars(f"OOD detection F1, {kind.replace('_', ' ')}", entries, "f1"))
    return out


def _bars(title: str, entries: Mapping[str, dict], key: str) -> str:
    known = {name: one for name, one in entries.items() if one[key] is not None}
    ends = {name: tuple(one["ci"][key]) for name, one in known.items() if one["ci"][key]}
    return bars(title, [(name, one[key], one["n"]) for name, one in known.items()], ends)


def sample_section(rows: Sequence[dict], taxonomy: Taxonomy, reveal: bool) -> str:
    """Rows as evaluation/samples.py makes them, and with `images`, data addresses; wrong answers first.

    Texts are folded and pictures blurred until clicked, unless `reveal`.
    """
    pictures = {row["id"]: row.get("images", []) for row in rows}
    return sample_tables(wrong_and_right(rows), taxonomy, pictures, True, not reveal)
