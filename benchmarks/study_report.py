"""docs/results.md from the study's files, docs/results/FORM/EXPERIMENT/RUN-SEED.json (study.py), and its plots.

The page is written by hand; only what stands between a line `<!-- study: NAME -->` and the next line `<!-- end -->` is replaced. Numbers
stand there and nowhere else. NAME is KIND-FORM, FORM accelerator or pilot, and KIND one of

* learning: experiment 1, a row for each system, AUROC by source, categories before and after; curve: the plot of GRPO's runs.
* naming: experiment 2 by bank, on never-seen and on masked rows; adversary: what a constant phrase earns.
* thinking, data: experiments 3 and 4, each setting beside experiment 1's GRPO; thoughts: verdicts averaged over several thoughts;
  obedience: whether answers follow a changed policy, before training and after.
* clock: experiment 5 with its plot; determinism: experiment 6.

Scores are of held-out rows (study_scores.py). A cell is the mean over the seeds with the smallest and the largest. A difference is the
mean over the seeds that both systems have, or, for a system of one seed, over the other's; its interval is the paired bootstrap at LEVEL:
groups of rows are drawn with replacement, the same for both systems and all seeds. It is about which rows were held out, not about seeds.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import study_adversary
import study_clock
from study_scores import (
    Files,
    Measure,
    System,
    difference,
    load,
    of_kind,
    of_source,
    once,
    rows,
    source_of,
    system,
    unsafe_auroc,
    unsafe_f1,
)

FORMS = ("accelerator", "pilot")
NOT_RUN = "Not run in this form."
SYSTEMS = {
    "majority": "majority",
    "majority_of_source": "majority per source",
    "words": "TF-IDF + logistic regression",
    "probe": "linear probe of the base model's states",
    "before": "zero-shot",
    "sft_rows": "SFT, equal rows",
    "sft_flops": "SFT, equal FLOPs",
    "grpo": "**GRPO**",
}
NAMED = {"never_seen": "never seen", "ood": "masked"}  # kinds of rows whose category the policy lacks
NEARNESS = {"naming": "naming", "naming_second": "second embedder", "naming_mrr": "MRR", "naming_top1": "top 1"}


# --- cells and tables --------------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Three digits of a float."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value != value:
        return "-"
    return f"{value:.3g}".replace("e+", "e") if isinstance(value, float) else str(value)


def spread(values: Iterable[float | None], digits: str = ".3f") -> str:
    """Mean (smallest to largest); those that are there."""
    known = [value for value in values if value is not None and value == value]
    if not known:
        return "-"
    low, mean, high = (format(value, digits) for value in (min(known), float(np.mean(known)), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def score(own: System, measure: Measure) -> str:
    return spread(once(rows, measure) for rows in own.values())


def gap(own: System, base: System, measure: Measure) -> str:
    if not base or own is base:
        return "-"
    value, low, high = difference(own, base, measure)
    return "-" if np.isnan(value) else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def cost(files: list[dict], name: str) -> float | int | None:
    """Mean over the seeds."""
    known = [one["cost"][name] for one in files if name in one.get("cost", {})]
    mean = float(np.mean(known)) if known else None
    return round(mean) if mean is not None and name in ("rows", "seconds") else mean


def by_source(systems: dict[str, System]) -> str:
    some = next(iter(next(iter(systems.values())).values()))
    sources = sorted({source_of(id) for id in some["id"]})
    unsafe = {source: [u for id, u in zip(some["id"], some["unsafe"], strict=True) if source_of(id) == source] for source in sources}
    head = {source: f"{source} ({len(unsafe[source])} rows, {sum(unsafe[source]):.0f} unsafe)" for source in sources}
    lines = [{"AUROC": label} | {head[s]: score(own, partial(of_source, s)) for s in sources} for label, own in systems.items()]
    return table(lines)


def categories(files: Files) -> str:
    """What is made of categories; OOD F1 needs the whole answers, so it is there for runs by GRPO, from their curves."""
    lines = []
    for label, runs in files.items():
        curves = [one["curve"] for one in runs if "curve" in one]
        for moment, at in (("before", 0), ("after", -1)) if curves else (("after", -1),):
            of = lambda name: spread(curve[at][name] for curve in curves)  # noqa: B023, E731
            own = system(runs, moment)
            detected = score(own, partial(of_kind, tuple(NAMED), "ood_detected")) if moment == "after" else None
            line = {"system": f"{label}, {moment}", "category accuracy": score(own, partial(of_kind, ("node",), "category_right"))}
            lines.append(line | {"OOD detected": detected, "OOD F1": of("ood_f1"), "naming": of("naming")})
    kinds = [one["after"]["category"] for runs in files.values() for one in runs]
    count = lambda *names: spread((sum(kind in names for kind in kind_P) for kind_P in kinds), ".0f")  # noqa: E731
    over = (
        f"Category accuracy is over the held-out rows whose gold category the prompt's policy lists, {count('node')} of "
        f"{count('node', 'none', 'unknown', *NAMED)}; detected, the share of which it is said that the policy lacks the risk, over the "
        f"{count(*NAMED)} where it does, which a free name for every risk always is; OOD F1, which then is low, over all rows whose "
        f"category is known, {count('node', 'none', *NAMED)}. Naming is the mean similarity of the name by the reward's embedder (mean, "
        "fewest to most by run)."
    )
    return f"{table(lines)}\n\n{over}"


def footer(files: Files) -> str:
    """How the files were made: commands, and by which commit, when and on what."""
    ones = [one for runs in files.values() for one in runs]
    seeds = " ".join(map(str, sorted({one["seed"] for one in ones})))
    made: dict[tuple[str, ...], list[str]] = {}
    for one in ones:
        machine = ", ".join(f"{name} {value}" for name, value in one["machine"].items())
        names = made.setdefault((one["commit"] or "unknown", one["date"], machine), [])
        names += [] if one["run"] in names else [one["run"]]
    lines = [f"* {', '.join(names)}: commit {commit}, {date}; {machine}" for (commit, date, machine), names in sorted(made.items())]
    command = f"python benchmarks/study.py run {ones[0]['experiment']} --form {ones[0]['form']} --seeds {seeds}"
    return "\n".join([f"`{command}`", "", *lines])


# --- blocks: bodies from an experiment's files, and those of experiment 1's GRPO ---------------------------------------------------


def learning(files: Files, base: list[dict]) -> str:
    runs = files | ({"before": base} if base else {})
    systems = {name: system(runs[name], "before" if name == "before" else "after") for name in SYSTEMS if name in runs}
    grpo, lines = systems.get("grpo", {}), []
    for name, own in systems.items():
        line = {"system": SYSTEMS[name], "seeds": len(own), "held out": len(next(iter(own.values()))["id"])}
        line |= {"AUROC": score(own, unsafe_auroc), "unsafe F1": score(own, unsafe_f1)}
        line |= {"AUROC less GRPO's": gap(own, grpo, unsafe_auroc), "F1 less GRPO's": gap(own, grpo, unsafe_f1)}
        trained = "cost" in runs[name][0] and name != "before"
        spent = [cost(runs[name], of) if trained else None for of in ("rows", "flops", "seconds")]
        spent[0] = spent[0] or ("none" if name == "before" else "all")
        lines.append(line | dict(zip(("training rows", "FLOPs", "seconds"), spent, strict=True)))
    missing = [SYSTEMS[name] for name in SYSTEMS if name not in systems]
    parts = [table(lines), *([f"Not run in this form: {'; '.join(missing)}."] if missing else [])]
    parts.append(by_source({SYSTEMS[name]: own for name, own in systems.items()}))
    told = {
        label: runs[name] for name, label in SYSTEMS.items() if name in runs and name != "before" and "category" in runs[name][0]["after"]
    }
    return "\n\n".join(parts + ([categories(told)] if told else []))


def curve(files: Files, _base: list[dict]) -> str:
    last = [one["curve"][-1] for one in files["grpo"]]
    of = lambda name, digits: spread((one[name] for one in last), digits)  # noqa: E731
    return f"At the last step: {of('step', '.0f')} steps, {of('tokens', ',.0f')} tokens, {of('seconds', '.0f')} seconds."


def settings(files: Files, base: list[dict]) -> str:
    shown = ({"as experiment 1": base} if base else {}) | {name.replace("_", " "): runs for name, runs in sorted(files.items())}
    systems, lines = {label: system(runs) for label, runs in shown.items()}, []
    grpo = systems.get("as experiment 1", {})
    for label, runs in shown.items():
        own = systems[label]
        line = {"setting": label, "seeds": len(own), "AUROC": score(own, unsafe_auroc), "unsafe F1": score(own, unsafe_f1)}
        line |= {"AUROC less experiment 1's": gap(own, grpo, unsafe_auroc), "F1 less experiment 1's": gap(own, grpo, unsafe_f1)}
        first, last = (float(np.mean([one["trained"]["length"][at] for one in runs])) for at in (0, -1))
        line["answer tokens, first and last step"] = f"{first:.1f}, {last:.1f}"
        lines.append(line | {"tokens": cost(runs, "tokens"), "seconds": cost(runs, "seconds")})
    return "\n\n".join([table(lines), by_source(systems), categories(shown)])


def thoughts(files: Files, _base: list[dict]) -> str:
    counts = list(files["averaged"][0]["thoughts"])
    ones = {count: [one["thoughts"][count] for one in files["averaged"]] for count in counts}
    systems = {count: {one["seed"]: rows(one["thoughts"][count]) for one in files["averaged"]} for count in counts}
    lines = []
    for count, own in systems.items():
        line = {"thoughts": "the likeliest" if count == "1" else f"{count} drawn", "AUROC": score(own, unsafe_auroc)}
        line |= {"AUROC less the likeliest's": gap(own, systems["1"], unsafe_auroc), "unsafe F1": score(own, unsafe_f1)}
        line |= {"calibration error": spread(one["ece"] for one in ones[count])}
        line |= {"calibrated": spread(one["ece_calibrated"] for one in ones[count])}
        lines.append(line | {name: spread((one[name] for one in ones[count]), ".0f") for name in ("tokens", "seconds")})
    return table(lines)


def obedience(files: Files, _base: list[dict]) -> str:
    lines = []
    for condition in files["obedience"][0]["after"]:
        line: dict[str, object] = {"policy": condition}
        for moment in ("before", "after"):
            ones = [one[moment][condition] for one in files["obedience"]]
            line[f"obeyed, {moment}"] = spread(one["obeyed"] for one in ones)
            line[f"asked, {moment}"] = spread((one["n"] for one in ones), ".0f")
        lines.append(line)
    return table(lines)


def naming(files: Files, _base: list[dict]) -> str:
    systems = {name: system(files[name]) for name in sorted(files, key=[*study_adversary.VARIANTS, "no_ood_task"].index)}
    full, lines = systems.get("full", {}), []
    for kind, label in NAMED.items():
        for name, own in systems.items():
            count = spread((float((rows["category"] == kind).sum()) for rows in own.values()), ".0f")
            line = {"rows": label, "bank": name.replace("_", " "), "seeds": len(own), "held out": count}
            for column, title in {"ood_detected": "detected", **NEARNESS}.items():
                measure = partial(of_kind, (kind,), column)
                versus = gap(own, full, measure)
                line[title] = score(own, measure) + ("" if versus == "-" else f"<br>{versus}")
            lines.append(line)
    return f"{table(lines)}\n\nBelow a mean: its difference to the full bank's.\n\n{categories({name: files[name] for name in systems})}"


def adversary(files: Files, _base: list[dict]) -> str:
    [found] = files["adversary"]
    lines = [{name: value for name, value in line.items() if name != "phrase"} for line in study_adversary.table(found)]
    searched = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found["search"].items())
    return f"{table(lines)}\n\nPairs: the constant phrase, a held-out synonym. The search: {searched}."


def clock(files: Files, _base: list[dict]) -> str:
    lines, levels, seeds = [], study_clock.table(files["toy"]), len(files["toy"])
    for level in (*study_clock.LEVELS, None):
        own = [row for row in levels if row["reward"] == level]
        line = {"mean reward": level or "last step"}
        for side, name in (("pgjax", "pgjax"), ("TRL", "trl")):
            reached = [row[f"{name}_s"] for row in own if row[f"{name}_s"]]
            line |= {f"{side}, seeds": f"{len(reached)} of {seeds}", f"{side}, steps": spread((row[f"{name}_step"] for row in own), ".0f")}
            line[f"{side}, seconds"] = spread(reached, ".1f")
        lines.append(line | {"TRL's seconds / pgjax's": spread((row["ratio"] for row in own), ".2f")})
    paces = [{"seconds of a step": side} | study_clock.pace(files["toy"], name) for side, name in (("pgjax", "pgjax"), ("TRL", "trl"))]
    return f"{table(lines)}\n\n{table(paces)}"


def determinism(files: Files, _base: list[dict]) -> str:
    [found] = files["toy"]
    lines = []
    for row in found["settings"]:
        line = {"setting": row["setting"], "step 1 equal": row["step_1_tokens_equal"]}
        line |= {"steps equal": f"{row['steps_tokens_equal']} of {row['steps']}", "answers equal": row["answers_equal"]}
        line |= {f"Δ {name.replace('_', ' ')}": row[f"{name}_difference"] for name in ("reward", "loss", "grad_norm", "logprob")}
        lines.append(line | {"bitwise": row["metrics_bitwise_equal"], "bitwise as": "; ".join(row["metrics_equal_to"]) or None})
    gaps = [{"sampler less trainer, nats": dtype} | gap for dtype, gap in found["sampler_trainer"].items()]
    sizes = "; ".join(f"{name.replace('_', ' ')} {cell(value)}" for name, value in found["base_mean_size"].items())
    recipe = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found["recipe"].items())
    return f"{table(lines)}\n\nMean size with one device: {sizes}. The recipe: {recipe}.\n\n{table(gaps)}"


KINDS: dict[str, tuple[str, Callable[[str], bool], Callable]] = {  # experiment, the names of its runs, body
    "learning": ("learning", lambda name: True, learning),
    "curve": ("learning", lambda name: name == "grpo", curve),
    "naming": ("naming", lambda name: name != "adversary", naming),
    "adversary": ("naming", lambda name: name == "adversary", adversary),
    "thinking": ("thinking", lambda name: name != "averaged", settings),
    "thoughts": ("thinking", lambda name: name == "averaged", thoughts),
    "data": ("data", lambda name: name != "obedience", settings),
    "obedience": ("data", lambda name: name == "obedience", obedience),
    "clock": ("clock", lambda name: True, clock),
    "determinism": ("determinism", lambda name: True, determinism),
}


PICTURES = {
    "curve": "held-out AUROC and F1 against steps, tokens and seconds, and training reward against steps",
    "clock": "mean reward of the sampled answers against seconds, pgjax and TRL",
}


def block(kind: str, form: str, found: dict[str, Files]) -> str:
    experiment, own, make = KINDS[kind]
    files = {name: runs for name, runs in found.get(experiment, {}).items() if own(name)}
    if not files:
        return NOT_RUN
    picture = [f"![{PICTURES[kind]}](results/{kind}_{form}.svg)"] if kind in PICTURES else []
    return "\n\n".join([*picture, make(files, found.get("learning", {}).get("grpo", [])), footer(files)])


def filled(page: str, results: Path) -> str:
    """The page with its blocks made anew. ValueError for a marker that is not known, or has no end."""
    found = {form: load(results / form) for form in FORMS}
    made, inside = [], ""
    for line in page.splitlines():
        name = re.fullmatch(r"<!-- study: (.*) -->", line)
        if line == "<!-- end -->":
            if not inside:
                raise ValueError("docs/results.md: an end without a beginning")
            inside = ""
        elif name:
            kind, _, form = name[1].partition("-")
            if inside or kind not in KINDS or form not in FORMS:
                raise ValueError(f"docs/results.md: {inside} is not closed" if inside else f"docs/results.md: no block {name[1]!r}")
            inside = name[1]
            made += [line, "", block(kind, form, found[form]), ""]
            continue
        if not inside:
            made.append(line)
    if inside:
        raise ValueError(f"docs/results.md: {inside} is not closed")
    return "\n".join(made) + "\n"


def report(results: Path, docs: Path) -> None:
    """Write the blocks of docs/results.md, and the plots that they show."""
    page = docs / "results.md"
    page.write_text(filled(page.read_text(), results))
    import study_plots  # the extra `docs`, which the text does without

    for form in FORMS:
        study_plots.draw(load(results / form), form, docs / "results")
