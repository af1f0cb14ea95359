"""`pgjax evaluate-rewriter`: targets with and without what is put in front of them, over sets of requests, graded by a judge.

Every ask goes through an endpoint that keeps its answers in OUT/cache, so that an evaluation that was killed goes on where it was.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pgjax.data.schema import Example
from pgjax.data.sources.files import data_root, first_groups
from pgjax.data.sources.items import Item
from pgjax.data.sources.rewriting import jsonl_items, read_items
from pgjax.endpoint import DEFAULTS, Endpoint, Failed, Limits, Reply
from pgjax.files import check_out, replace_file
from pgjax.flow import some_at_a_time
from pgjax.pages.samples import thumbnail
from pgjax.rewriter import evaluation_report as report
from pgjax.rewriter.defences import BASELINES, DEFENCES, REWRITER, Answered, Defence, rewriting
from pgjax.rewriter.judge import Grade, Unparsed, asked, grading
from pgjax.rewriter.measures import Row, measure
from pgjax.rewriter.rewriter import Rewriter
from pgjax.serving.endpoints import open_endpoint
from pgjax.taxonomy import Taxonomy, load_taxonomy
from pgjax.train.progress import Progress
from pgjax.train.saved import fingerprint

UNKNOWN = "unknown, nothing left out"
KEPT = "{} of {} answers of {} are kept ones of an earlier run. Where another model has its address by now, give another --out."

Read = Callable[[], Iterator[Item | str]]


@dataclass(frozen=True)
class Job:
    benchmarks: Sequence[str]  # names of sources/rewriting.py, NAME:PART for a part of one (see `in_part`), or files of rows, *.jsonl
    targets: Sequence[str]  # as serving/endpoints.py takes them, like the judge
    judge: str
    out: Path
    defences: Sequence[str] = ()  # none: all, `rewriter` where there is one
    rewriter: Path | None = None
    data: str | None = None
    limit: int | None = None
    limits: Limits = DEFAULTS
    allow_remote: bool = False
    seed: int = 0
    reveal: bool = False

    def __post_init__(self) -> None:
        if (self.out / "config.json").exists():
            raise ValueError(f"--out {self.out} is a run folder or a model, whose report would be overwritten; give another")
        check_out(self.out)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} must be 1 or more")
        if REWRITER in self.defences and not self.rewriter:
            raise ValueError("--defence rewriter needs --rewriter, the run folder of a trained one")
        if self.rewriter and self.defences and REWRITER not in self.defences:
            raise ValueError("--rewriter is not among the defences; leave it out, or add rewriter to --defence")

    @property
    def chosen(self) -> list[str]:
        """The defences in the order in which they run: an answer of an earlier one that a later one needs comes from the cache."""
        return [name for name in DEFENCES if name in self.defences or (not self.defences and (name != REWRITER or self.rewriter))]


class Set(NamedTuple):
    """A benchmark: what to read again, and which of it is used."""

    read: Read
    ids: frozenset[str]
    left_out: Counter[str]  # rows not used, by reason


def run(job: Job) -> tuple[dict, str]:
    """The summary (see measures.py; with `about` and `notes`) and its tables as text; writes evaluation.json, answers.jsonl, tables.md and
    report.html. ValueError for what cannot be read or opened, and where no row was answered or none graded."""
    taxonomy = load_taxonomy()
    sets = {name: choose(name, read, job, taxonomy) for name, read in readers(job, taxonomy).items()}
    rows, about, notes = asyncio.run(answer(job, sets))
    for missing, why in (("answered", "no target answered anything"), ("grade", "no answer was graded")):
        if all(getattr(row, missing) is None for row in rows):
            raise ValueError(f"{why}; the first reason: {rows[0].why}")
    summary = measure(rows, {name: dict(one.left_out) for name, one in sets.items()}, job.seed) | {"about": about, "notes": notes}
    write(job, summary, rows, sets)
    return summary, report.as_text(summary)


# --- the sets --------------------------------------------------------------------------------------------------------------------------


def readers(job: Job, taxonomy: Taxonomy) -> dict[str, Read]:
    """By the name that reports use."""
    found: dict[str, Read] = {}
    for given in dict.fromkeys(job.benchmarks):
        own = given.endswith(".jsonl")
        name = Path(given).stem if own else given
        if name in found:
            raise ValueError(f"--benchmark: two sets are called {name}; rename a file")
        whole, colon, part = given.partition(":")
        read = partial(jsonl_items, Path(given)) if own else partial(read_items, whole, data_root(job.data))
        read = partial(read, taxonomy)
        found[name] = partial(in_part, name, part, read) if colon and not own else read
    return found


def in_part(name: str, part: str, read: Read) -> Iterator[Item | str]:
    """The items whose ids have `part` behind the set's name, such as `test` of VLGuard; rows that are left out have none and are those
    of the whole set."""
    there = set()
    for row in read():
        if isinstance(row, Item):
            there.add(own := row.example.id.split("-")[1])
        if isinstance(row, str) or own == part:
            yield row
    if part not in there:
        raise ValueError(f"--benchmark {name}: the set has no such part; there are {', '.join(sorted(there)[:20])}")


def choose(name: str, read: Read, job: Job, taxonomy: Taxonomy) -> Set:
    """All rows, or the first groups. What the rewriter has learnt from is left out for all, and what may never be sent."""
    seen, reserved = trained_on(job.rewriter) or (), {node.id for node in taxonomy.nodes if node.reserved}
    examples, left_out = [], Counter[str]()
    for row in read():
        if isinstance(row, str):
            left_out[row] += 1
        elif reserved & {row.example.node, *row.example.accepted}:
            left_out["reserved"] += 1
        elif row.example.group in seen:
            left_out["trained on"] += 1
        else:
            examples.append(measured(row.example))
    if not examples:
        raise ValueError(f"benchmark {name} has no row to use; left out: {dict(left_out)}")
    ids = [example.id for example in first_groups(examples, job.limit or len(examples))]
    if twice := [id for id, number in Counter(ids).items() if number > 1]:
        raise ValueError(f"benchmark {name}: two rows have the id {twice[0][:40]!r}")
    return Set(read, frozenset(ids), left_out)


def measured(example: Example) -> Example:
    """Without its picture. Its group is what intervals draw and --limit takes whole: that of its picture, but of MM-SafetyBench the
    question, whose three pictures are one case."""
    parts = example.id.split("-")  # mm_safetybench-01-SD_TYPO-17
    group = "-".join(parts[:2] + parts[3:]) if example.source == "mm_safetybench" else example.group
    return replace(example, images=(), group=group)


def trained_on(rewriter: Path | None) -> frozenset[str] | None:
    """Groups of the rows that it was trained on, as its run folder or what was exported from it lists them; None where nothing does."""
    file = rewriter and rewriter / "data" / "groups.json"
    if not (file and file.is_file()):
        return None
    try:
        return frozenset(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must hold a list of groups, as JSON; copy the run folder again") from error


def items(one: Set) -> Iterator[Item]:
    return (row for row in one.read() if not isinstance(row, str) and row.example.id in one.ids)


# --- asking ----------------------------------------------------------------------------------------------------------------------------


async def answer(job: Job, sets: Mapping[str, Set]) -> tuple[list[Row], dict, list[str]]:
    """A row for each item, target and defence; what the figures were made with; and what must be known of it first."""
    async with AsyncExitStack() as stack:
        enter = lambda spec: stack.enter_async_context(open_endpoint(spec, job.limits, job.out / "cache", job.allow_remote))  # noqa: E731
        opened = {spec: Asked(await enter(spec)) for spec in dict.fromkeys([*job.targets, job.judge])}
        targets, judge = [opened[spec] for spec in dict.fromkeys(job.targets)], opened[job.judge]
        if twice := [name for name, number in Counter(target.name for target in targets).items() if number > 1]:
            raise ValueError(f"--target: two targets are called {twice[0]}")
        defences = {name: BASELINES[name] for name in job.chosen if name in BASELINES}
        if job.rewriter and REWRITER in job.chosen:
            rewriter = stack.enter_context(Rewriter.load(job.rewriter))
            rewriter.rewrite("", ())  # which compiles, before any clock starts
            defences[REWRITER] = rewriting(rewriter, job.out / "cache" / "rewrites", fingerprint(job.rewriter))
        total = sum(len(one.ids) for one in sets.values()) * len(targets) * len(defences)
        rows: list[Row] = []
        with Progress("evaluate", total) as progress:

            async def through(name: str, item: Item) -> None:
                for target in targets:
                    for defence in defences:
                        rows.append(await one_row(name, item.example, target, defence, defences[defence], judge))
                        progress.update(len(rows))

            every = (partial(through, name, item) for name, one in sets.items() for item in items(one))
            await some_at_a_time(every, job.limits.concurrency * len(targets))
        unknown = job.rewriter is not None and trained_on(job.rewriter) is None
        about = {
            "rewriter": str(job.rewriter or report.DASH),
            "training rows": UNKNOWN if unknown else "left out" if job.rewriter else report.DASH,
            "judge": judge.name,
            "targets": ", ".join(target.name for target in targets),
            "rows of each set": f"at most {job.limit}" if job.limit else "all",
            "seed": job.seed,
            "requests at a time": job.limits.concurrency * len(targets),
            "calls": report.counted(sum((one.endpoint.counts for one in opened.values()), Counter())),
        }
        notes = [KEPT.format(one.kept, len(one.asked), one.name) for one in opened.values() if one.kept]
        notes += [f"Training rows of the rewriter are {UNKNOWN}: it has no data/groups.json."] * unknown
    return sorted(rows, key=lambda row: (row.benchmark, row.example.id, row.target, DEFENCES.index(row.defence))), about, notes


class Asked:
    """An endpoint that counts how many of the answers it is asked for an earlier run has kept; what this run asks twice counts once."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.name = endpoint, endpoint.name
        self.asked: set[int] = set()
        self.kept = 0

    async def ask(self, messages: list[dict], **how: int) -> Reply:
        content = hash(json.dumps([messages, how]))
        first = content not in self.asked
        self.asked.add(content)
        reply = await self.endpoint.ask(messages, **how)
        self.kept += first and reply.cached
        return reply


async def one_row(name: str, example: Example, target: Endpoint, defence: str, how: Defence, judge: Endpoint) -> Row:
    row = partial(Row, name, measured(example), target.name, defence)
    answered: Answered | None = None
    try:
        answered = await how(target, example.request or "", example.images)
        return row(answered, await graded(judge, example, answered.text))
    except Failed as error:
        return row(answered, None, error.kind, str(error))
    except Unparsed as error:
        return row(answered, None, "no grade", f"the judge's answer is no grade: {error}")
    except ValueError as error:  # what the rewriter or an endpoint cannot be asked
        return row(answered, None, "unfit", str(error))


async def graded(judge: Endpoint, example: Example, answer: str) -> Grade:
    """By the request as it was before any defence. Raises Failed, Unparsed."""

    async def ask(messages: list[dict]) -> tuple[str, dict]:
        return (await judge.ask(messages)).text, {}

    return await asked(ask, grading(example.request or "", example.images, answer), Grade)


# --- files -----------------------------------------------------------------------------------------------------------------------------


def write(job: Job, summary: dict, rows: list[Row], sets: Mapping[str, Set]) -> None:
    """answers.jsonl has no texts: content stays in the report, folded."""
    samples = report.most_changed(rows)
    shown = {(row.benchmark, row.example.id) for sample in samples for row in sample}
    asked = ((name, item.example) for name, one in sets.items() for item in items(one))
    pictures = {(name, example.id): thumbnails(example) for name, example in asked if (name, example.id) in shown}
    job.out.mkdir(parents=True, exist_ok=True)
    replace_file(job.out / "answers.jsonl", "".join(json.dumps(row.bare()) + "\n" for row in rows))
    replace_file(job.out / "evaluation.json", json.dumps(summary, indent=1) + "\n")
    replace_file(job.out / "tables.md", report.as_markdown(summary))
    replace_file(job.out / "report.html", report.as_html(summary, samples, pictures, job.reveal))


def thumbnails(example: Example) -> list[str]:
    """None of a picture that cannot be read: endpoints see to that for themselves."""
    try:
        return [thumbnail(image) for image in example.images]
    except ValueError:
        return []
