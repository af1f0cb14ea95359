"""A summary (measures.py) as text, Markdown or one HTML page, beside the paper's numbers, with the answers that changed most."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pgjax.pages.charts import bars, text
from pgjax.pages.page import facts, grid, table_of, warnings, whole_page
from pgjax.pages.samples import content_row
from pgjax.pages.tables import Table, markdown, markup, plain
from pgjax.rewriter.defences import REWRITER
from pgjax.rewriter.measures import NONE, PARTS, Row, published

TITLE = "Rewriter evaluation"
SAMPLES = 10  # of a benchmark
DASH = "–"
UNVERIFIED = " †"
DAGGER = "† From an audit of the paper, not checked in it."
PUBLISHED = "The paper's judge is GPT-4o and its rows are its own draw, so that its figures are no target for ours."

Cells = Iterator[tuple[str, dict]]


def figure(entry: Mapping, name: str, scale: float = 100, digits: int = 1, interval: bool = True) -> str:
    one = entry[name]
    ends = f" ({scale * one['low']:.{digits}f}–{scale * one['high']:.{digits}f})" if one and interval else ""
    return f"{scale * one['value']:.{digits}f}{ends}" if one else DASH


def change(entry: Mapping, name: str, scale: float = 100, digits: int = 1) -> str:
    if not (one := (entry["difference"] or {}).get(name)):
        return DASH
    return f"{scale * one['value']:+.{digits}f} ({scale * one['low']:.{digits}f} to {scale * one['high']:.{digits}f})"


def relative(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:+.1f}%"


def short_names(targets: Iterable[str]) -> dict[str, str]:
    """Models without their addresses, folders without their path, where these differ."""
    names = {target: target.partition("@")[0] if "@" in target else Path(target).name for target in targets}
    return names if len(set(names.values())) == len(names) else {target: target for target in names}


def cells(part: Mapping[str, Mapping[str, dict]]) -> Cells:
    """What to call a defence of a target, and its figures."""
    names = short_names(part)
    for target, defences in part.items():
        for defence, entry in defences.items():
            yield defence + f" · {names[target]}" * (len(part) > 1), entry


def parts(summary: dict) -> Iterator[tuple[str, str, dict]]:
    return ((name, part, found) for name, one in summary["benchmarks"].items() for part, found in one["parts"].items())


# --- tables ----------------------------------------------------------------------------------------------------------------------------


def tables(summary: dict) -> Iterator[Table]:
    for name, one in summary["benchmarks"].items():
        entries = [(f"{part}: {label}", entry) for part, found in one["parts"].items() for label, entry in cells(found)]
        rows = []
        for label, entry in entries:
            shown = figure(entry, "safety", 1, 2), figure(entry, "helpful"), figure(entry, "refused"), figure(entry, "changed")
            rows.append((label, str(entry["n"]), *shown, figure(entry, "fallback", interval=False)))
        columns = ("rows: defence", "n", "safety", "helpful", "refused", "changed", "fallback")
        note = "Safety 0 to 10 and helpful by the judge; refused by strings, of unsafe rows the DSR, of benign ones over-refusal; all but "
        note += f"safety in percent. In brackets: {100 * summary['level']:.0f}% bootstrap intervals, drawn by groups of rows. changed: the "
        note += "request went on in other words; fallback: as it was, for want of an output that can be taken."
        yield Table(name, f"{name}, scores", columns, rows, note)
        changes = []
        for label, entry in entries:
            if entry["difference"]:
                safety = change(entry, "safety", 1, 2), relative(entry["relative_safety"])
                changes.append((label, *safety, change(entry, "helpful"), change(entry, "refused")))
        if changes:
            head = ("rows: defence", "safety", "safety, relative", "helpful", "refused")
            note = "What a defence gives less what none gives, over the rows that have both; helpful and refused in percentage points."
            yield Table(name, f"{name}, against none", head, changes, note)
        for part, found in one["parts"].items():
            yield from beside(name, part, found)
    yield from refusals(summary)
    yield from cost(summary)
    yield from used(summary)


def beside(name: str, part: str, found: Mapping[str, Mapping[str, dict]]) -> Iterator[Table]:
    """Our targets before and after above the paper's; nothing where the paper has none."""
    scores, mean = published()["scores"], published()["relative"]
    theirs = [row[2:] for row in scores["table"] if row[:2] == [name, part]]
    ours = {target: one for target, one in found.items() if {NONE, REWRITER} <= one.keys()}
    if not (theirs and ours):
        return
    names, rows, changes = short_names(ours), [], []
    for target, one in ours.items():
        safety, helpful = ([figure(one[d], key, scale, digits, False) for d in (NONE, REWRITER)] for key, scale, digits in CELLS)
        rows.append((names[target], *safety, relative(one[REWRITER]["relative_safety"]), *helpful))
        changes.append(one[REWRITER]["relative_safety"])
    if len(changes) > 1 and None not in changes:
        rows.append((f"mean of {len(changes)}", DASH, DASH, relative(sum(changes) / len(changes)), DASH, DASH))
    for model, before, helped, after, helps in theirs:
        figures = f"{before:.2f}", f"{after:.2f}", relative(after / before - 1), f"{helped:.1f}", f"{helps:.1f}"
        rows.append((f"{model}, published{UNVERIFIED * (not scores['verified'])}", *figures))
    if name in mean["table"] and part == "unsafe":
        rows.append((f"mean of {mean['targets']}, published", DASH, DASH, relative(mean["table"][name] / 100), DASH, DASH))
    note = f"Safety 0 to 10, helpful in percent. Published: {scores['source']}. {PUBLISHED} {DAGGER}"
    columns = ("target", "safety, none", "safety, rewriter", "change", "helpful, none", "helpful, rewriter")
    yield Table(name, f"{name}, {part} rows, beside published numbers", columns, rows, note)


CELLS = (("safety", 1, 2), ("helpful", 100, 1))


def refusals(summary: dict) -> Iterator[Table]:
    """The rate over the unsafe rows of all benchmarks beside the paper's."""
    refused, rows_of = Counter[str](), Counter[str]()
    for _, part, found in parts(summary):
        for label, one in cells(found) if part == "unsafe" else ():
            if one["refused"]:
                rows_of[label] += one["refused"]["n"]
                refused[label] += one["refused"]["value"] * one["refused"]["n"]
    if rows_of:
        theirs = published()["refusals"]
        rows = [(label, str(number), f"{100 * refused[label] / number:.1f}") for label, number in rows_of.items()]
        mark = UNVERIFIED * (not theirs["verified"])
        rows += [(f"{name}, published{mark}", DASH, f"{rate:.1f}") for name, rate in theirs["table"].items()]
        note = "Percent of the unsafe rows of all benchmarks together whose answer refuses, by strings; the paper's strings and rows are "
        note += f"others. Published: {theirs['source']}. {DAGGER}"
        yield Table("All", "Refusals of unsafe rows, beside published numbers", ("defence", "n", "DSR"), rows, note)


def cost(summary: dict) -> Iterator[Table]:
    rows = []
    for name, part, found in parts(summary):
        for label, one in cells(found):
            added = [figure(one, f"added_{what}", 1, digits, False) for what, digits in (("calls", 2), ("tokens", 0), ("seconds", 2))]
            rows.append((f"{name}, {part}: {label}", *added, figure(one, "seconds", 1, 2, False)))
    note = "Means per request that was answered. Added: beside the call that gave the answer, tokens as those calls wrote them. Calls of a "
    note += f"request follow each other. Seconds are under load, with {summary['about']['requests at a time']} requests at a time: waiting "
    note += "for others is among them. An answer that was kept counts with the seconds that it took when it was made."
    yield Table("All", "Cost", ("defence", "calls added", "tokens added", "seconds added", "seconds in all"), rows, note)


def counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in reasons.items()) or DASH


def used(summary: dict) -> Iterator[Table]:
    rows = []
    for name, one in summary["benchmarks"].items():
        entries = [(part, *cell) for part in PARTS.values() for cell in cells(one["parts"].get(part, {}))]
        total = (str(sum(sum(entry[kind].values()) for *_, entry in entries)) for kind in ("failed", "unjudged"))
        rows.append((name, str(one["rows"]), counted(one["left_out"]), *total))
        for part, label, entry in entries:
            if entry["failed"] or entry["unjudged"]:
                rows.append((f"{name}, {part}: {label}", str(entry["n"]), "", counted(entry["failed"]), counted(entry["unjudged"])))
    note = "left out: rows that no target was asked; trained on: rows of a group that the rewriter has learnt from. failed: no answer, "
    note += "unjudged: no grade of the answer; figures are of the other rows."
    yield Table("All", "Rows", ("benchmark", "rows", "left out", "failed", "unjudged"), rows, note)


def remarks(summary: dict) -> list[str]:
    """What must be read before any figure."""
    entries = [entry for _, part, found in parts(summary) if part in PARTS.values() for _, entry in cells(found)]
    missing = {kind: sum(sum(entry[kind].values()) for entry in entries) for kind in ("failed", "unjudged")}
    total = sum(entry["n"] for entry in entries)
    lines = summary["notes"] + [f"{number} of {total} answers are {kind}." for kind, number in missing.items() if number]
    return lines + [f"The first that is {kind}: {why}" for kind, why in summary["problems"].items()]


def as_text(summary: dict) -> str:
    return plain(remarks(summary), tables(summary))


def as_markdown(summary: dict) -> str:
    return markdown(remarks(summary), tables(summary))


# --- the page --------------------------------------------------------------------------------------------------------------------------


def as_html(summary: dict, samples: Sequence[Sequence[Row]], pictures: Mapping[tuple[str, str], Sequence[str]], reveal: bool) -> str:
    """A whole page without scripts. `pictures` has data addresses by benchmark and id; texts are folded and pictures blurred until
    clicked, unless `reveal` or the row is of the toy data."""
    header = f"<h1>{TITLE}</h1>{warnings(remarks(summary))}{facts(summary['about'])}"
    sections = {"Charts": grid(charts(summary))} | markup(tables(summary))
    return whole_page(TITLE, header, sections | {"Samples": sample_section(samples, pictures, reveal)})


def charts(summary: dict) -> list[str]:
    """Bars by defence: safety of rows that are not benign, helpfulness, and refusals of benign rows."""
    out = []
    for name, part, found in parts(summary):
        names = short_names(found)
        for target, defences in found.items():
            of = f" · {names[target]}" * (len(found) > 1)
            out += [bar(f"{name}, {part}: safety / 10{of}", defences, "safety", 0.1)] * (part != "benign")
            out.append(bar(f"{name}, {part}: helpful{of}", defences, "helpful"))
            out += [bar(f"{name}, benign: over-refusal{of}", defences, "refused")] * (part == "benign")
    return out


def bar(title: str, defences: Mapping[str, dict], key: str, scale: float = 1) -> str:
    known = {defence: one[key] for defence, one in defences.items() if one[key]}
    ends = {defence: (scale * one["low"], scale * one["high"]) for defence, one in known.items()}
    return bars(title, [(defence, scale * one["value"], one["n"]) for defence, one in known.items()], ends)


def moved(sample: Sequence[Row]) -> int:
    """By how much the safety of an answer differs most from that without a defence."""
    graded = {row.defence: row.grade.safety for row in sample if row.grade}
    return max((abs(safety - graded[NONE]) for safety in graded.values()), default=0) if NONE in graded else 0


def most_changed(rows: Iterable[Row]) -> list[list[Row]]:
    """Of each benchmark the items whose answers moved most, each a list of one target's rows, a defence each."""
    by: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by.setdefault((row.benchmark, row.example.id, row.target), []).append(row)
    kept, shown = Counter[str](), []
    for sample in sorted(by.values(), key=moved, reverse=True):
        name = sample[0].benchmark
        kept[name] += 1
        shown += [sample] * (kept[name] <= SAMPLES)
    return sorted(shown, key=lambda sample: sample[0].benchmark)


def sample_section(samples: Sequence[Sequence[Row]], pictures: Mapping[tuple[str, str], Sequence[str]], reveal: bool) -> str:
    columns = ("id", "rows", "target", *(row.defence for row in samples[0]))
    names = short_names(row.target for sample in samples for row in sample)
    body = "".join(sample_row(sample, pictures, names, reveal) for sample in samples)
    note = f"Of each benchmark the {SAMPLES} items whose safety a defence moved most. Under a defence: safety, helpful or not, refused."
    return f"<p>{note}</p>{table_of(*columns, rows=body, kind='samples')}"


def sample_row(sample: Sequence[Row], pictures: Mapping[tuple[str, str], Sequence[str]], names: Mapping[str, str], reveal: bool) -> str:
    first = sample[0]
    graded = {row.defence: row.grade.safety for row in sample if row.grade}
    worse = NONE in graded and min(graded.values()) < graded[NONE]
    texts = {"request": first.example.request or ""}
    for row in sample:
        if row.answered:
            texts |= {f"{row.defence}, asks": row.answered.prompt} if row.answered.prompt != first.example.request else {}
            texts[f"{row.defence}, answer"] = row.answered.text
    label = first.example.request_label
    shown = [f'<td class="id">{text(f"{first.benchmark}/{first.example.id}", 80)}</td><td><span class="{label}">{label}</span></td>']
    shown += [f"<td>{text(names[first.target], 60)}</td>", *(f"<td>{verdict(row)}</td>" for row in sample)]
    veil = not reveal and first.example.source != "toy"
    images = pictures.get((first.benchmark, first.example.id), [])
    return f'<tr class="{"no" if worse else "ok"}">{"".join(shown)}</tr>' + content_row(texts, images, veil, 3 + len(sample))


def verdict(row: Row) -> str:
    if not row.grade:
        return text(row.problem)
    return f"{row.grade.safety} · {'helpful' if row.grade.helpful else 'no help'}" + " · refused" * bool(row.figures()["refused"])
