"""`pgjax data build`: sources become one balanced, cleaned dataset with its card.

All sources are read once, into a pool on disk. Duplicates, and what benchmarks hold, are taken out; rows without labels are voted on; rows
are chosen for the targets; the plan is shown; the chosen rows are written. Every choice is settled by hashes of contents.
"""

import asyncio
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pgjax.data.balance import Entry, Plan, balance
from pgjax.data.build import write_rows
from pgjax.data.card import Counts, markdown_card, new_card
from pgjax.data.dataset import Dataset
from pgjax.data.duplicates import Record, clean, record
from pgjax.data.pool import Writer
from pgjax.data.schema import Example
from pgjax.data.sources.benchmarks import read_benchmark
from pgjax.data.sources.files import data_root, order_of
from pgjax.data.sources.registry import find_source
from pgjax.data.stats import category_of, unsafe
from pgjax.data.vote import Vote, Votes, label, lines, vote
from pgjax.endpoint import Endpoint
from pgjax.files import check_out, new_folder
from pgjax.taxonomy import load_taxonomy
from pgjax.train.progress import Progress

SOME = 20  # so many broken rows of a source end no build, whatever their share
REJECTED = "rejected.jsonl"


Judges = Callable[[], AbstractAsyncContextManager[Sequence[Endpoint]]]


def build(config: Dataset, judges: Judges | None, show: Callable[[dict], None]) -> dict:
    """Makes `config.folder` and returns its card, which `show` is given before the rows are written. `judges` opens those of
    `config.vote`. ValueError for what cannot be read or opened, for a source with too many broken rows, and where nothing is left."""
    folder, began = config.folder, time.monotonic()
    check_out(folder)
    if folder.exists():
        raise ValueError(f"dataset folder {folder} exists already; remove it, or give --out another")
    with new_folder(folder) as aside:
        work = _Work(config, aside)
        work.read()
        work.clean()
        if config.vote and judges:
            asyncio.run(work.annotate(config.vote, judges))
        plan = work.choose()
        card = new_card(config, work.found, work.counts, plan, work.leaked, work.votes)
        show(card)
        card |= {"hash": work.write(plan), "seconds": round(time.monotonic() - began, 1)}
        (aside / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (aside / "card.md").write_text(markdown_card(card), encoding="utf-8")
    return card


class _Work:
    def __init__(self, config: Dataset, folder: Path):
        self.config, self.folder, self.taxonomy, self.root = config, folder, load_taxonomy(), data_root(config.root)
        self.found = {name: find_source(name, self.root) for name in config.sources}
        self.counts = {name: Counts() for name in config.sources}
        self.sources: dict[int, str] = {}  # of the rows in the pool that may be chosen, by their number there
        self.records: list[Record] = []  # of all rows in the pool
        self.leaked, self.votes = Counter[str](), Votes((), {}, {})

    def read(self) -> None:
        """Every row of every source, into the pool. ValueError where too many of a source's are broken."""
        pool = Writer(self.folder / "pool")
        with open(self.folder / REJECTED, "w", encoding="utf-8") as rejected:
            for source, found in self.found.items():
                counts = self.counts[source]
                with Progress(f"read {source}", 0) as progress:
                    for row in found.read(self.root, self.taxonomy):
                        counts.rows += 1
                        progress.update(counts.rows)
                        if isinstance(row, Example):
                            self.sources[pool.add(row)] = source
                            self.records.append(record(row))
                        elif row.broken:
                            counts.rejected[row.kind] += 1
                            rejected.write(json.dumps({"source": source} | row._asdict()) + "\n")
                        else:
                            counts.left_out[row.kind] += 1
                rejected.flush()
                self._check(source, counts)
        self.pool = pool.close()

    def _check(self, source: str, counts: Counts) -> None:
        broken = counts.rejected.total()
        if broken > max(SOME, self.config.max_rejected * counts.rows):
            kept = self.config.folder.with_name(f"{self.config.folder.name}-{REJECTED}")
            shutil.copy(self.folder / REJECTED, kept)
            kinds = ", ".join(f"{kind} ({n})" for kind, n in counts.rejected.most_common())
            raise ValueError(
                f"source {source}: {broken} of {counts.rows} rows are broken: {kinds}; {kept} lists them; --max-rejected allows"
            )

    def clean(self) -> None:
        """Takes out duplicates, and training rows that benchmarks hold."""
        sets = {name: map(record, read_benchmark(name, self.root, self.taxonomy).examples) for name in self.config.benchmarks}
        cleaned = clean(self.records, sets, self.config.near)
        for number, reason in enumerate(cleaned.why):
            if reason:
                self._leave_out(number, reason)
        self.leaked = cleaned.leaked

    def _leave_out(self, number: int, reason: str) -> None:
        self.counts[self.sources.pop(number)].left_out[reason] += 1

    async def annotate(self, config: Vote, judges: Judges) -> None:
        with Progress("vote", len(self.sources)) as progress:

            def rows() -> Iterator[Example]:
                for done, number in enumerate(sorted(self.sources)):
                    progress.update(done)
                    yield self.pool[number]

            async with judges() as opened:
                self.votes = await vote(rows(), config, self.taxonomy, opened)
        with open(self.folder / "votes.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines(self.votes))

    def row(self, number: int) -> Example:
        """With what it got by vote."""
        row = self.pool[number]
        voted = self.votes.rows.get((row.source, row.id))
        return label(row, voted.decided, self.taxonomy) if voted else row

    def choose(self) -> Plan:
        """ValueError where nothing is left."""
        entries = []
        for number in sorted(self.sources):
            row = self.row(number)
            if {row.request_label, row.response_label} <= {"unknown", "absent"}:
                self._leave_out(number, "label unknown")
                continue
            kind = row.modality, unsafe(row), category_of(row, self.taxonomy)
            entries.append(Entry(number, order_of(row.group), self.sources[number], row.split, *kind))
        plan = balance(entries, self.config.targets, dict(self.config.at_most))
        for entry in plan.chosen:
            self.counts[entry.source].chosen[entry.split] += 1
        if not plan.chosen:
            raise ValueError(f"dataset {self.config.name}: no row is left for the targets; the sources gave {len(entries)} others")
        return plan

    def write(self, plan: Plan) -> str:
        """The chosen rows; their hash, which does not depend on their order."""
        with Progress("write", len(plan.chosen)) as progress:

            def rows() -> Iterator[Example]:
                for done, entry in enumerate(plan.chosen, 1):
                    yield self.row(entry.number)
                    progress.update(done)

            write_rows(rows(), self.folder)
        (self.folder / "pool").unlink()
        return hashlib.sha256(b"".join(sorted(self.records[entry.number].key for entry in plan.chosen))).hexdigest()
