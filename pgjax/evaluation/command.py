"""`pgjax evaluate`: benchmarks through a guard; evaluation.json, tables.md, report.html and answers.jsonl."""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgjax import automaton as answers
from pgjax.data.build import read_dataset
from pgjax.data.schema import UNSAFE, Example
from pgjax.data.sources.benchmarks import BENCHMARKS, read_benchmark
from pgjax.data.sources.files import Read, data_root, first_groups
from pgjax.data.sources.registry import SOURCES
from pgjax.evaluation import tables
from pgjax.evaluation.evaluate import Answered
from pgjax.evaluation.obedience import CONDITIONS, obedience
from pgjax.evaluation.passes import Judges, evaluate_set
from pgjax.evaluation.probes import probe_gaps
from pgjax.evaluation.samples import sample_rows
from pgjax.evaluation.summary import HELD_OUT, PROBES, Evaluated, summary
from pgjax.files import replace_file
from pgjax.models.sentence_encoder import load_embedder
from pgjax.models.static_encoder import load_static_encoder
from pgjax.pages.samples import ROWS, thumbnail, wrong_and_right
from pgjax.serving.guard import Guard, How
from pgjax.serving.verdict import free_name
from pgjax.train.progress import Progress
from pgjax.train.training_rows import overlap, read_training_rows


def run(folder: Path, args: argparse.Namespace, how: How, options: dict[str, Any]) -> tuple[dict, str]:
    """The summary (evaluation/summary.py, with `guard`, `not_evaluated`, `overlap`, `obedience` and `probes`) and its tables as text;
    writes the files. ValueError where nothing could be evaluated, and for rows that the model was trained on."""
    out = Path(args.out)
    if (out / "config.json").exists():
        raise ValueError(f"--out {out} is a run folder or a model, whose report would be overwritten; give another")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be 1 or more")
    with Guard.load(folder, **options) as guard:
        sets = {name: read_set(guard, folder, name, args) for name in dict.fromkeys(args.benchmark)}
        seen_rows = check_overlap(folder, {name: read.examples for name, (read, _) in sets.items()}, args.allow_overlap)
        found: dict[str, Any] = {"not_evaluated": {}, "overlap": seen_rows, "obedience": {}, "probes": {}}
        judges = make_judges(guard)
        evaluated: list[Evaluated] = []
        rows: list[dict] = []
        with Progress("evaluate", sum(expected(read.examples, args.obedience) for read, _ in sets.values())) as progress:
            steps = itertools.count(1)
            seen = lambda: progress.update(next(steps))  # noqa: E731
            for name, (read, lines) in sets.items():
                rest = guard.policy(), name, read.examples, lines, read.left_out, how, judges, args.seed, seen
                try:
                    one, first, answered = evaluate_set(guard, *rest)
                except ValueError as error:
                    found["not_evaluated"][name] = str(error)
                    continue
                evaluated.append(one)
                rows += samples(guard, name, answered)
                if name == PROBES:
                    found["probes"] = probe_gaps(flagged(answered[0]), seed=args.seed)
                if args.obedience and (obeyed := obedience(guard, first, how, args.seed, seen)):
                    found["obedience"][name] = obeyed
        if not evaluated:
            raise ValueError("; ".join(found["not_evaluated"].values()))
        whole = summary(evaluated, seed=args.seed) | found | {"guard": about(guard, folder, how, args, first.verdicts[0])}
        write(out, guard, whole, rows, {e.id: e for read, _ in sets.values() for e in read.examples}, args.reveal)
    return whole, tables.as_text(whole, folder.name)


def about(guard: Guard, folder: Path, how: How, args: argparse.Namespace, verdict: dict) -> dict[str, Any]:
    """What the figures were made with; what decides is read off a verdict."""
    return {
        "model": str(folder),
        "mode": how.mode,
        "samples": how.samples,
        "threshold": verdict["threshold"],
        "calibrated": verdict["calibrated"],
        "bound": guard.bound,
        "longest prompt": guard.recipe.data.prompt_tokens,
        "embedder": guard.recipe.reward.embedder or "all-MiniLM-L6-v2",
        "seed": args.seed,
        "rows of each set": ("held-out ones" if args.held_out else "all") + (f", at most {args.limit}" if args.limit else ""),
        "trained on": guard.recipe.data.name,
        "not_a_guard": guard.recipe.not_a_guard,
    }


def check_overlap(model: Path, sets: Mapping[str, Sequence[Example]], allow: bool) -> dict[str, int] | None:
    """By set, the rows that the model was trained on; None where nothing beside it tells. ValueError for any unless `allow`."""
    if (trained := read_training_rows(model)) is None:
        return None
    found = {name: overlap(examples, trained) for name, examples in sets.items()}
    if any(found.values()) and not allow:
        named = ", ".join(f"{number} of {len(sets[name])} rows of {name}" for name, number in found.items() if number)
        raise ValueError(f"{model} was trained on {named}; --held-out may leave them out, --allow-overlap evaluates all the same")
    return found


def expected(examples: list[Example], obeying: bool) -> int:
    """Answers that a set takes: the first pass, what the second asks of rows with a known category, and what obedience does."""
    about = sum(example.category == "node" for example in examples)
    known = about + sum(example.category == "none" for example in examples) if about else 0
    return len(examples) + known + obeying * about * len(CONDITIONS)


def flagged(answered: Answered) -> dict[str, bool]:
    """By example id, whether the answer calls anything unsafe; one that does not parse does, as a guard fails closed."""
    said = answered.verdict
    unsafe_P = ~said.parsed | (said.request == UNSAFE) | (said.response == UNSAFE)
    return {example.id: bool(unsafe) for (example, _), unsafe in zip(answered.batch.rows, unsafe_P, strict=True)}


def read_set(guard: Guard, folder: Path, name: str, args: argparse.Namespace) -> tuple[Read, tuple[str, ...]]:
    """Rows of a benchmark, and the lines that it labels."""
    if name == HELD_OUT:
        if not (folder / "data" / "dataset_info.json").is_file():
            raise ValueError(f"benchmark {HELD_OUT}: {folder}/data holds no rows; only a run folder brings held-out ones")
        lines: tuple[str, ...] = ("request", "response")
        read = Read(list(read_dataset(folder / "data", "eval")), Counter())
    else:
        root = data_root(args.data) if name in BENCHMARKS and SOURCES[name].where else Path()
        read = read_benchmark(name, root, guard.taxonomy)
        lines = BENCHMARKS[name]
        if args.held_out:
            read = read._replace(examples=[example for example in read.examples if example.split == "eval"])
    if args.limit is None or args.limit >= len(read.examples):
        return read, lines
    return read._replace(examples=first_groups(read.examples, args.limit)), lines


def make_judges(guard: Guard) -> Judges:
    second = load_static_encoder()
    embedder = load_embedder(guard.recipe.reward.embedder)
    return Judges.of(guard.taxonomy, {"naming": embedder} | ({"naming_second": second} if second else {}))


def samples(guard: Guard, name: str, answered: list[Answered]) -> list[dict]:
    """Rows of both passes, texts and names among them; ids are unique, `example` is the row's own."""
    rows = []
    for number, one in enumerate(answered, 1):
        for row, text in zip(sample_rows(one, guard.taxonomy, True), one.texts, strict=True):
            said = free_name(answers.category_text(text) or "") if row["verdict"]["kind"] == answers.NAME else None
            own = {"id": f"{name}/{row['id']}" + "/second" * (number - 1), "example": row["id"], "pass": number, "name": said}
            rows.append(row | own)
    return rows


def in_turn(rows: list[dict]) -> list[dict]:
    """The first row of every set, then the second of every one, and so on: a report shows the first ones."""
    seen = Counter[str]()
    turns = []
    for row in rows:
        name = row["id"].partition("/")[0]
        turns.append(seen[name])
        seen[name] += 1
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]


def write(out: Path, guard: Guard, found: dict, rows: list[dict], examples: dict[str, Example], reveal: bool) -> None:
    """answers.jsonl has no texts but the names that the guard gave: content stays in the report, folded. The report has the first pass."""
    out.mkdir(parents=True, exist_ok=True)
    name, first = Path(found["guard"]["model"]).name, in_turn([row for row in rows if row["pass"] == 1])
    for part in wrong_and_right(first).values():
        for row in part[:ROWS]:
            row["images"] = [thumbnail(image) for image in examples[row["example"]].images]
    bare = lambda row: {key: value for key, value in row.items() if key not in ("request", "response", "answer", "images", "example")}  # noqa: E731
    replace_file(out / "answers.jsonl", "".join(json.dumps(bare(row)) + "\n" for row in rows))
    replace_file(out / "evaluation.json", json.dumps(found, indent=1) + "\n")
    replace_file(out / "tables.md", tables.as_markdown(found, name))
    page = tables.as_html(found, name, found["guard"], tables.sample_section(first, guard.taxonomy, reveal))
    replace_file(out / "report.html", page)
