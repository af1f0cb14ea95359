"""`pgjax synthesize`: items of the sources become training rows of the rewriter (PAPERS B2, B3, B8), checked, with all that tells how.

Which items are taken is settled by hashes of their groups' names, so it is the same in every run. The endpoints keep their replies in a
folder beside the data: a run that was killed, or in which calls failed, is run again and asks only what has no answer yet.
"""

import dataclasses
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pgjax import __version__
from pgjax.data.schema import Example, Label
from pgjax.data.sources.files import data_root, order_of
from pgjax.data.sources.items import Item
from pgjax.data.sources.rewriting import jsonl_items, read_items
from pgjax.endpoint import Failed, command_line
from pgjax.files import check_out, new_folder
from pgjax.flow import some_at_a_time
from pgjax.rewriter.config import TOY, Synthesis
from pgjax.rewriter.quality import SAFE_ALREADY, Ends, Made, make, version
from pgjax.rewriter.record import template
from pgjax.rewriter.stages import STAGES
from pgjax.rewriter.toy import toy_items
from pgjax.serving.endpoints import open_endpoint
from pgjax.taxonomy import Taxonomy, load_taxonomy
from pgjax.train.progress import Progress

GIVE_UP = 50  # items since the last row: so many that failed, or came to nothing before there was any row, and no more are asked for
TEMPLATES = (*STAGES, "judge")
NEVER_ELICITED = {"C8", "C8S2", "C11", "C11S1"}  # a top-level category may stand for its leaf


class Key(NamedTuple):
    """Of an item; keys in order are the order in which items are taken."""

    order: int
    source: str
    id: str


class Entry(NamedTuple):
    """An item that was made, without its picture."""

    example: Example
    image: str | None  # path of the picture in the data's folder
    made: Made


async def synthesize(config: Synthesis, allow_remote: bool = False) -> dict:
    """Makes `config.folder` anew and returns its manifest. ValueError for what cannot be read or opened, and where nothing answers."""
    folder, began = config.folder, time.monotonic()
    replies = folder.with_name(f"{folder.name}-replies")
    check_out(folder), check_out(replies)
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} is there and is no data of an earlier synthesis; give --out another folder")
    async with AsyncExitStack() as stack:
        specs = dict.fromkeys((config.analyst, config.target, config.judge))
        opened = {spec: await stack.enter_async_context(open_endpoint(spec, config.limits, replies, allow_remote)) for spec in specs}
        analyst, target, judge = (opened[spec] for spec in (config.analyst, config.target, config.judge))
        if config.elicit and not target.here:
            raise ValueError(f"elicit: the target {target.name} is not on this machine; only a model here is asked for unsafe answers")
        made_here = stack.enter_context(new_folder(folder, replace=True))
        run = _Run(config, Ends(analyst, target, judge), made_here)
        await run.fill()
        names = {role: opened[getattr(config, role)].name for role in ("analyst", "target", "judge")}
        manifest = {
            "name": config.name,
            "pgjax": __version__,
            "command": command_line(),
            "config": dataclasses.asdict(config) | names,
            "templates": {name: version(name) for name in TEMPLATES},
            **run.counts(),
            "endpoints": {endpoint.name: dict(endpoint.counts) for endpoint in opened.values()},
            "seconds": round(time.monotonic() - began, 1),
        }
        run.write(manifest)
    return manifest


class _Run:
    def __init__(self, config: Synthesis, ends: Ends, folder: Path):
        self.config, self.ends, self.folder, self.taxonomy = config, ends, folder, load_taxonomy()
        benign = round(config.limit * config.benign_share)
        self.wanted: dict[Label, int] = {"unsafe": config.limit - benign, "safe": benign}
        self.entries: dict[Key, Entry] = {}
        self.left_out: dict[str, Counter[str]] = {source: Counter() for source in config.sources}
        self.outcomes, self.barren = Counter[str](), 0  # the latter: see GIVE_UP
        (folder / "images").mkdir()

    # --- which items -----------------------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[tuple[Key, Item | str]]:
        """All rows of the sources, one by one, since an item holds its picture; what is not used, as the reason why."""
        for source in self.config.sources:
            for row in read(source, self.config, self.taxonomy):
                key = Key(-1, source, "") if isinstance(row, str) else Key(order_of(row.example.group), source, row.example.id)
                yield key, (row if isinstance(row, str) else unused(row, self.config.elicit) or row)

    async def fill(self) -> None:
        """Takes items until there are as many rows as wanted, or none are left. In place of items that were rejected others are taken,
        but not in place of failed ones: those come when the command is run again. ValueError where nothing comes of it."""
        keys: dict[Label, list[Key]] = {label: [] for label in self.wanted}
        for key, row in self.items():
            if isinstance(row, str):
                self.left_out[key.source][row] += 1
            else:
                keys[row.example.request_label].append(key)
        waiting = {label: iter(sorted(found)) for label, found in keys.items()}
        while taken := {key for label, n in self.wanted.items() for key in islice(waiting[label], n - self.settled(label))}:
            await self.round(taken)
        if self.entries and not self.outcomes["accepted"]:
            raise ValueError(f"none of {len(self.entries)} items became a row; {self.advice()}")

    def settled(self, label: Label) -> int:
        return sum(entry.example.request_label == label and entry.made.outcome != "rejected" for entry in self.entries.values())

    async def round(self, taken: set[Key]) -> None:
        """Makes these items, a few at a time."""
        with Progress("synthesize", len(self.entries) + len(taken), start=len(self.entries)) as progress:

            async def work(key: Key, item: Item) -> None:
                try:
                    made = await make(item, self.ends, self.config.min_safety)
                except Failed as error:
                    raise ValueError(str(error)) from None
                self.entries[key] = Entry(dataclasses.replace(item.example, images=()), self.keep(item.example, made), made)
                self.outcomes[made.outcome] += 1
                progress.update(len(self.entries), **self.outcomes)
                fruitless = not self.outcomes["accepted"] and made.reason != SAFE_ALREADY
                self.barren = 0 if made.outcome == "accepted" else self.barren + (made.outcome == "failed" or fruitless)
                if self.barren == GIVE_UP:
                    raise ValueError(f"{GIVE_UP} items became no row; {self.advice()}")

            items = (partial(work, key, row) for key, row in self.items() if key in taken and not isinstance(row, str))
            await some_at_a_time(items, 2 * self.config.limits.concurrency)  # an item asks one endpoint at a time

    def advice(self) -> str:
        made = [entry.made for entry in self.entries.values() if entry.made.reason]
        errors = dict.fromkeys(one.error for one in {one.reason: one for one in reversed(made)}.values() if one.error)  # the first ones
        told = "; ".join((f"reasons: {listed(Counter(one.reason for one in made))}", *errors))
        return f"{told}; what was answered is kept, and a later run goes on from there"

    # --- what is written -------------------------------------------------------------------------------------------------------------

    def keep(self, example: Example, made: Made) -> str | None:
        """Writes the picture of a row; its path in the folder."""
        if not example.images or made.outcome != "accepted":
            return None
        [data] = example.images
        with Image.open(io.BytesIO(data)) as image:
            name = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{(image.format or '').lower()}"
        (self.folder / name).write_bytes(data)
        return name

    def accepted(self) -> list[Entry]:
        return [entry for _, entry in sorted(self.entries.items()) if entry.made.outcome == "accepted"]

    def counts(self) -> dict:
        rows = Counter((self.split(entry), entry.example.request_label) for entry in self.accepted())
        sources: dict[str, dict] = {}
        for source, left_out in self.left_out.items():
            made = [entry.made for key, entry in self.entries.items() if key.source == source]
            reasons = {outcome: Counter(one.reason for one in made if one.outcome == outcome) for outcome in ("rejected", "failed")}
            accepted = sum(one.outcome == "accepted" for one in made)
            sources[source] = {"accepted": accepted, **reasons, "left_out": left_out}
        return {
            "wanted": self.wanted,
            "rows": {split: {label: rows[split, label] for label in self.wanted} for split in ("train", "eval")},
            "short": {label: n - rows["train", label] - rows["eval", label] for label, n in self.wanted.items()},
            "sources": sources,
        }

    def split(self, entry: Entry) -> str:
        """By the group's name, but not as files.split_of, which all of these are on one side of."""
        return "eval" if order_of(f"synthesis {entry.example.group}") < self.config.held_out * 2**64 else "train"

    def write(self, manifest: dict) -> None:
        for split in ("train", "eval"):
            self.write_lines(f"{split}.jsonl", [row_of(entry) for entry in self.accepted() if self.split(entry) == split])
        self.write_lines("audit.jsonl", [audit_of(entry) for _, entry in sorted(self.entries.items())])
        (self.folder / "templates").mkdir()
        for name in TEMPLATES:
            (self.folder / "templates" / f"{name}.txt").write_text(template(name), encoding="utf-8")
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def write_lines(self, name: str, rows: list[dict]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / name).write_text(text, encoding="utf-8", errors="replace", newline="\n")  # halves of characters


def listed(reasons: Counter[str]) -> str:
    """Reasons with their numbers, the most frequent first."""
    return ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common())


def summary(manifest: dict) -> str:
    """A manifest in a few lines."""
    lines = [f"{split}: {rows['unsafe']} unsafe and {rows['safe']} benign rows" for split, rows in manifest["rows"].items()]
    for source, counts in manifest["sources"].items():
        told = {name.replace("_", " "): Counter(counts[name]) for name in ("rejected", "failed", "left_out")}
        lines.append(f"{source}: {counts['accepted']} rows" + "".join(f"; {name}: {listed(n)}" for name, n in told.items() if n))
    short, failed = sum(manifest["short"].values()), any(counts["failed"] for counts in manifest["sources"].values())
    lines += [f"{short} rows fewer than limit asks for" + ("; run this again for those that failed" if failed else "")] if short else []
    return "\n".join(lines)


def read(source: str, config: Synthesis, taxonomy: Taxonomy) -> Iterator[Item | str]:
    """The rows of one source: sources/rewriting.py has those of sets and files."""
    if source == TOY:
        return iter(toy_items(0, 2 * config.limit, "train"))  # enough of either label, whatever the mix
    return jsonl_items(Path(source), taxonomy) if source.endswith(".jsonl") else read_items(source, data_root(config.root), taxonomy)


def unused(item: Item, elicit: bool) -> str | None:
    """Why an item is not used; None where it is."""
    example = item.example
    if example.split != "train":
        return "for evaluation"
    if example.request_label not in ("safe", "unsafe"):
        return "label unknown"
    if example.request_label == "unsafe" and item.safe is None:
        return "no safe answer"
    if example.request_label == "unsafe" and item.unsafe is None and not (elicit and may_elicit(example)):
        return "no unsafe answer"
    return None


def may_elicit(example: Example) -> bool:
    """Whether a model may be asked for an unsafe answer: never where what it is about is unknown, or may be among NEVER_ELICITED."""
    return example.category == "node" and example.node is not None and not NEVER_ELICITED & {example.node, *example.accepted}


def row_of(entry: Entry) -> dict:
    """A training row, as `pgjax sft` reads it."""
    example, rewriting = entry.example, entry.made.rewriting
    assert rewriting
    named = {"id": example.id, "group": example.group, "source": example.source, "label": example.request_label}
    return named | {
        "request": example.request,
        "image": entry.image,
        "report": rewriting.report.model_dump(),
        "rewrite": rewriting.prompt,
    }


def audit_of(entry: Entry) -> dict:
    """What became of an item and why; texts of models, but none where one was elicited."""
    example, made = entry.example, entry.made
    named = {"id": example.id, "source": example.source, "group": example.group, "label": example.request_label}
    grade = made.grade and made.grade.model_dump(include={"safety", "helpful"})
    return named | {"outcome": made.outcome, "reason": made.reason, "grade": grade, "attempts": made.attempts}
