"""`pgjax data build`: sources become one balanced, cleaned dataset with its card.

All sources are read once, into a pool on disk. Duplicates, and what benchmarks hold, are taken out; rows without labels are voted on; rows
are chosen for the targets; the plan is shown; the chosen rows are written. Every choice is settled by hashes of contents.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

from pgjax.data.balance import Entry, Plan, balance
from pgjax.data.build import write_rows
from pgjax.data.card import Compared, Counts, markdown_card, new_card
from pgjax.data.dataset import Dataset
from pgjax.data.duplicates import Record, clean, record
from pgjax.data.pool import Writer
from pgjax.data.schema import Example
from pgjax.data.sources.files import NO_LABEL, WITHHELD, LeftOut, data_root, order_of, strict
from pgjax.data.sources.registry import find_source
from pgjax.data.stats import category_of, unsafe
from pgjax.data.vote import WITHHELD as RESERVED
from pgjax.data.vote import Votes, label, lines, vote
from pgjax.endpoint import Endpoint
from pgjax.files import check_out, new_folder
from pgjax.taxonomy import load_taxonomy
from pgjax.train.progress import Progress

REJECTED = "rejected.jsonl"
TAKEN = "id of another row"


Judges = Callable[[], AbstractAsyncContextManager[Sequence[Endpoint]]]  # nobody, where there are none


async def build(config: Dataset, judges: Judges, show: Callable[[dict], None]) -> dict:
    """Makes `config.folder` and returns its card, which `show` is given before the rows are written. `judges` opens those of
    `config.vote`. ValueError for what cannot be read or opened, for a source with too many broken rows, and where nothing is left."""
    folder, began = config.folder, time.monotonic()
    check_out(folder)
    if folder.exists():
        raise ValueError(f"dataset folder {folder} exists already; remove it, or give --out another")
    async with judges() as opened:  # what cannot be opened is known before anything is read
        with new_folder(folder) as aside:
            work = _Work(config, aside)
            work.read()
            work.clean()
            if opened:
                await work.annotate(opened)
                work.clean_again()
            plan = work.choose()
            card = new_card(config, work.found, work.counts, plan, work.compared, work.votes)
            show(card)
            card |= {"hash": work.write(plan), "seconds": round(time.monotonic() - began, 1)}
            (aside / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
            (aside / "card.md").write_text(markdown_card(card), encoding="utf-8")
    return card


class _Work:
    def __init__(self, config: Dataset, folder: Path):
        self.config, self.folder, self.taxonomy, self.root = config, folder, load_taxonomy(), data_root(config.root)
        self.found = {name: find_source(name, self.root) for name in config.sources}
        self.benchmarks = {name: find_source(name, self.root) for name in config.benchmarks}
        self.reserved = {node.id for node in self.taxonomy.nodes if node.reserved}
        self.counts = {name: Counts() for name in config.sources}
        self.sources: dict[int, str] = {}  # of the rows in the pool that may be chosen, by their number there
        self.records: list[Record] = []  # of all rows in the pool
        self.compared = {name: Compared() for name in config.benchmarks}
        self.votes = Votes((), {}, {})

    def read(self) -> None:
        """Every row of every source, into the pool. ValueError where too many of a source's are broken."""
        pool, ids = Writer(self.folder / "pool"), set[str]()
        for source, found in self.found.items():
            counts = self.counts[source]
            with Progress(f"read {source}", 0) as progress:
                for row in found.read(self.root, self.taxonomy):
                    counts.rows += 1
                    progress.update(counts.rows)
                    if isinstance(row, Example) and row.id in ids:
                        row = LeftOut(TAKEN, f"{source}: row {counts.rows}", "has the id of an earlier row", broken=True)
                    elif isinstance(row, Example) and self.reserved & {row.node, *row.accepted}:
                        row = LeftOut(WITHHELD, source)
                    if isinstance(row, LeftOut):
                        (counts.rejected if row.broken else counts.left_out)[row.kind] += 1
                        counts.lost += row.lost
                        self._reject(source, row)
                        continue
                    ids.add(row.id)
                    self.sources[pool.add(row)] = source
                    self.records.append(record(row))
            self._check(source, counts)
        self.pool = pool.close()

    def _reject(self, source: str, row: LeftOut) -> None:
        if row.broken:
            with open(self.folder / REJECTED, "a", encoding="utf-8") as file:
                file.write(json.dumps({"source": source, "kind": row.kind, "where": row.where, "reason": row.reason}) + "\n")

    def _check(self, source: str, counts: Counts) -> None:
        broken = counts.rejected.total()
        if counts.lost > self.config.max_rejected or broken > self.config.max_rejected * counts.rows:
            kept = self.config.folder.with_name(f"{self.config.folder.name}-{REJECTED}")
            shutil.copy(self.folder / REJECTED, kept)
            kinds = ", ".join(f"{kind} ({n})" for kind, n in counts.rejected.most_common())
            files = f"{counts.lost:.0%} of the files cannot be read on, and " if counts.lost else ""
            told = f"source {source}: {files}{broken} of {counts.rows} rows are broken: {kinds}; {kept} lists them"
            raise ValueError(f"{told}; mend the files, or raise --max-rejected")

    def clean(self) -> None:
        """Takes out duplicates, and training rows that benchmarks hold. ValueError for a broken row of a benchmark: what it hides might be
        trained on."""
        for name, rows in self._clean({name: self._records_of(name) for name in self.benchmarks}).items():
            self.compared[name].leaked = rows

    def clean_again(self) -> None:
        """What rows got by vote may part them from their copies, or make them near ones."""
        for number, source in self.sources.items():
            if (source, self.pool[number].id) in self.votes.rows:
                self.records[number] = record(self.row(number))
        self._clean({})

    def _clean(self, benchmarks: dict[str, Iterator[Record]]) -> Counter[str]:
        """Of the rows that are left; how many training rows each benchmark holds."""
        numbers = sorted(self.sources)
        cleaned = clean([self.records[number] for number in numbers], benchmarks, self.config.near)
        for number, reason in zip(numbers, cleaned.why, strict=True):
            if reason:
                self._leave_out(number, reason)
        return cleaned.leaked

    def _records_of(self, benchmark: str) -> Iterator[Record]:
        compared = self.compared[benchmark]
        try:
            for row in strict(self.benchmarks[benchmark].read(self.root, self.taxonomy)):
                if isinstance(row, LeftOut):
                    compared.left_out[row.kind] += 1
                else:
                    compared.rows += 1
                    yield record(row)
        except ValueError as error:
            raise ValueError(f"benchmark {benchmark}: {error}; mend the file, or take it out of benchmarks") from None

    def _leave_out(self, number: int, reason: str) -> None:
        self.counts[self.sources.pop(number)].left_out[reason] += 1

    async def annotate(self, judges: Sequence[Endpoint]) -> None:
        """Rows stand under the names that the config gives their sources."""
        with Progress("vote", len(self.sources)) as progress:

            def rows() -> Iterator[Example]:
                for done, number in enumerate(sorted(self.sources)):
                    progress.update(done)
                    yield replace(self.pool[number], source=self.sources[number])

            self.votes = await vote(rows(), self.config.vote, self.taxonomy, judges)
        with open(self.folder / "votes.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines(self.votes))

    def row(self, number: int) -> Example:
        """With what it got by vote."""
        row = self.pool[number]
        voted = self.votes.rows.get((self.sources[number], row.id))
        return label(row, voted.decided, self.taxonomy) if voted else row

    def choose(self) -> Plan:
        """ValueError where nothing is left."""
        entries = []
        for number in sorted(self.sources):
            row = self.row(number)
            voted = self.votes.rows.get((self.sources[number], row.id))
            if voted and any(ballot.problem == RESERVED for ballot in voted.ballots):
                self._leave_out(number, WITHHELD)
            elif {row.request_label, row.response_label} <= {"unknown", "absent"}:
                self._leave_out(number, NO_LABEL)
            else:
                order = order_of(row.group), self.records[number].key
                kind = row.modality, unsafe(row), category_of(row, self.taxonomy)
                entries.append(Entry(number, order, self.sources[number], row.split, *kind))
        plan = balance(entries, self.config.targets, dict(self.config.at_most))
        for entry in plan.chosen:
            self.counts[entry.source].chosen[entry.split] += 1
        if not plan.chosen:
            raise ValueError(f"dataset {self.config.name}: no row is left for the targets; the sources gave {len(entries)} others")
        return plan

    def write(self, plan: Plan) -> str:
        """The chosen rows; a hash of their contents, splits and labels, which does not depend on their order."""
        digests = []
        with Progress("write", len(plan.chosen)) as progress:

            def rows() -> Iterator[Example]:
                for done, entry in enumerate(plan.chosen, 1):
                    row = self.row(entry.number)
                    known = row.split, row.request_label, row.response_label, row.category, row.node, row.accepted, row.name
                    digests.append(hashlib.sha256(self.records[entry.number].key + repr(known).encode()).digest())
                    yield row
                    progress.update(done)

            write_rows(rows(), self.folder)
        (self.folder / "pool").unlink()
        return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
