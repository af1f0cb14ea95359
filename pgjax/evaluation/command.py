"""`pgjax evaluate`: benchmarks through a guard; evaluation.json, tables.md, report.html and answers.jsonl."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pgjax.bank import PUBLISHED_MAX, PUBLISHED_MEAN
from pgjax.data.build import read_dataset
from pgjax.data.schema import UNSAFE, Example
from pgjax.data.sources.benchmarks import BENCHMARKS, read_benchmark
from pgjax.data.sources.files import Read, data_root, order_of
from pgjax.evaluation import tables
from pgjax.evaluation.evaluate import Answered
from pgjax.evaluation.obedience import CONDITIONS, obedience
from pgjax.evaluation.passes import Judges, evaluate_set
from pgjax.evaluation.probes import probe_gaps
from pgjax.evaluation.samples import sample_rows
from pgjax.evaluation.summary import summary
from pgjax.files import replace_file
from pgjax.models.sentence_encoder import load_embedder
from pgjax.models.static_encoder import load_static_encoder
from pgjax.pages.samples import ROWS, thumbnail, wrong_and_right
from pgjax.serving.guard import Guard, How
from pgjax.train.materials import make_banks
from pgjax.train.progress import Progress

HELD_OUT, PROBES = "held_out", "probes"  # the benchmark that a run folder brings along, and ours that comes with the package


def run(folder: Path, args: argparse.Namespace, how: How, options: dict[str, Any]) -> tuple[dict, str]:
    """The summary (evaluation/summary.py, with `guard`, and `obedience` by benchmark) and its tables as text; writes the files."""
    out = Path(args.out)
    with Guard.load(folder, **options) as guard:
        sets = {name: read_set(guard, folder, name, args) for name in dict.fromkeys(args.benchmark)}
        found: dict[str, Any] = {"obedience": {}}
        judges = make_judges(guard)
        evaluated, kept = [], []
        with Progress("evaluate", sum(expected(read.examples, args.obedience) for read, _ in sets.values())) as progress:
            rows = 0

            def seen() -> None:
                nonlocal rows
                rows += 1
                progress.update(rows)

            for name, (read, lines) in sets.items():
                rest = guard.policy(), name, read.examples, lines, read.left_out, how, judges, args.seed, seen
                try:
                    one, answered = evaluate_set(guard, *rest)
                except ValueError as error:
                    if len(sets) == 1:
                        raise
                    print(f"pgjax: left out: {error}", file=sys.stderr)
                    continue
                evaluated.append(one)
                if name == PROBES:
                    found["probes"] = probe_gaps(flagged(answered), seed=args.seed)
                kept += samples(guard, name, answered)
                if args.obedience and (obeyed := obedience(guard, read.examples, how, args.seed, seen)):
                    found["obedience"][name] = obeyed
        about = {
            "model": str(folder),
            "mode": how.mode,
            "samples": how.samples,
            "threshold": how.threshold,
            "calibrated": guard.calibration is not None,
            "bound": guard.bound,
            "seed": args.seed,
            "rows of each set": "all" if args.limit is None else f"at most {args.limit}",
            "not_a_guard": guard.recipe.not_a_guard,
        }
        whole = summary(evaluated, seed=args.seed) | found | {"guard": about}
        write(out, guard, whole, kept, {e.id: e for read, _ in sets.values() for e in read.examples}, args.reveal)
    return whole, tables.as_text(whole, folder.name)


def expected(examples: list[Example], obeying: bool) -> int:
    """Answers that a set takes: the first pass, and what is asked of the rows with a known category."""
    return len(examples) + sum(e.category == "node" for e in examples) * (1 + obeying * (1 + len(CONDITIONS)))


def flagged(answered: Answered) -> dict[str, bool]:
    """By example id, whether the answer calls anything unsafe; one that does not parse does, as a guard fails closed."""
    said = answered.verdict
    unsafe_P = ~said.parsed | (said.request == UNSAFE) | (said.response == UNSAFE)
    return {example.id: bool(unsafe) for (example, _), unsafe in zip(answered.batch.rows, unsafe_P, strict=True)}


def read_set(guard: Guard, folder: Path, name: str, args: argparse.Namespace) -> tuple[Read, tuple[str, ...]]:
    """Rows of a benchmark, and the lines that it labels."""
    if name == HELD_OUT:
        if not (folder / "data").is_dir():
            raise ValueError(f"benchmark {HELD_OUT}: {folder} has no data/; only a run folder brings held-out rows")
        read, lines = Read(list(read_dataset(folder / "data", "eval")), Counter()), ("request", "response")
    else:
        root = data_root(args.data) if name in BENCHMARKS and BENCHMARKS[name].where else Path()
        read = read_benchmark(name, root, guard.taxonomy)
        lines = BENCHMARKS[name].lines
        if args.held_out:
            read = read._replace(examples=[example for example in read.examples if example.split == "eval"])
    if args.limit is None or args.limit >= len(read.examples):
        return read, lines
    return read._replace(examples=first_groups(read.examples, args.limit)), lines


def first_groups(examples: list[Example], limit: int) -> list[Example]:
    """At most so many rows, in an order by a hash of their groups' names."""
    return sorted(examples, key=lambda example: (order_of(example.group), example.id))[:limit]


def make_judges(guard: Guard) -> Judges:
    embedder = load_embedder(guard.recipe.reward.embedder)
    bank, _ = make_banks(guard.recipe, guard.taxonomy, embedder)
    second = load_static_encoder()
    encoders = {"naming": embedder} | ({"naming_second": second} if second else {})
    published = guard.recipe.reward.variant == "published"
    thresholds = (PUBLISHED_MAX, PUBLISHED_MEAN) if published else (float(bank.max_threshold), float(bank.mean_threshold))
    return Judges.of(guard, encoders, thresholds)


def samples(guard: Guard, name: str, answered: Answered) -> list[dict]:
    """Rows for the report, texts among them; ids are unique over benchmarks, `example` is the row's own."""
    rows = sample_rows(answered, guard.taxonomy, True)
    return [row | {"id": f"{name}/{row['id']}", "example": row["id"]} for row in rows]


def write(out: Path, guard: Guard, found: dict, rows: list[dict], examples: dict[str, Example], reveal: bool) -> None:
    """answers.jsonl has no texts: content stays in the report, folded."""
    out.mkdir(parents=True, exist_ok=True)
    name = Path(found["guard"]["model"]).name
    for part in wrong_and_right(rows).values():
        for row in part[:ROWS]:
            row["images"] = [thumbnail(image) for image in examples[row["example"]].images]
    bare = lambda row: {key: value for key, value in row.items() if key not in ("request", "response", "answer", "images", "example")}  # noqa: E731
    replace_file(out / "answers.jsonl", "".join(json.dumps(bare(row)) + "\n" for row in rows))
    replace_file(out / "evaluation.json", json.dumps(found, indent=1) + "\n")
    replace_file(out / "tables.md", tables.as_markdown(found, name))
    warning = "toy model: not a guard" if found["guard"]["not_a_guard"] else ""
    page = tables.as_html(found, name, found["guard"], tables.sample_section(rows, guard.taxonomy, reveal), warning)
    replace_file(out / "report.html", page)
