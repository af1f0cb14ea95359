"""`make demo-rewriter`: the toy rewriter from data to gateway, with the programs of the toy world as analyst, target and judge.

The held-out requests are those of toy_items' split "eval": no training row has one of them, though every word of theirs.
"""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pgjax.config import Recipe
from pgjax.data.sources.items import Item
from pgjax.files import new_folder, remove_folder, replace_file
from pgjax.rewriter.config import Synthesis
from pgjax.rewriter.evaluate import Job, run
from pgjax.rewriter.lessons import read_lessons
from pgjax.rewriter.rewriter import Rewriter
from pgjax.rewriter.synthesis import summary as synthesized
from pgjax.rewriter.synthesis import synthesize
from pgjax.rewriter.toy import toy_items
from pgjax.rewriter.toy_server import toy_server
from pgjax.sft.trainer import train

HELD_OUT = 240  # requests, half of them risky
SHOWN = 4  # of them, printed with what the rewriter makes of them
PARTS = ("data", "data-replies", "rewriter", "held_out", "evaluation", "gateway")  # folders that the demo makes
FILES = ("gateway.log", "summary.json")


def demo(recipe: Recipe, synthesis: Synthesis, out: Path) -> None:
    """Starts over in the folder `out`. ValueError where something else lies there."""
    began = time.monotonic()
    if unknown := sorted({path.name for path in out.glob("*")} - {*PARTS, *FILES}):
        raise ValueError(f"{out} holds {unknown[0]}, which no demo made; give --runs another folder")
    for part in PARTS:
        remove_folder(out / part)
    items = toy_items(recipe.seed, HELD_OUT, "eval")
    with toy_server() as toy:
        ends = {role: f"toy-{role}@{toy.url}" for role in ("analyst", "target", "judge")}
        print(synthesized(asyncio.run(synthesize(replace(synthesis, out=str(out / "data"), **ends)))))
        recipe = replace(recipe, data=replace(recipe.data, root=str(out / "data")))
        train(recipe, out / "rewriter", *read_lessons(recipe.data), fresh=True)
        rows = write_items(items, out / "held_out")
        alone = Job([rows], [ends["target"]], ends["judge"], out / "evaluation", rewriter=out / "rewriter", reveal=True)
        print(f"\n{run(alone)[1]}")
        with gateway(out / "rewriter", toy.url, out / "gateway.log") as url:
            behind = Job([rows], [f"toy-target@{url}"], ends["judge"], out / "gateway", ("none",), reveal=True)
            run(behind)
    print(shown(out / "rewriter", items[:SHOWN]))
    seconds = {"seconds": round(time.monotonic() - began, 1)}
    summary = seconds | figures(answers(alone), answers(behind), synthesis.min_safety) | {"report": str(alone.out / "report.html")}
    replace_file(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def write_items(items: Sequence[Item], folder: Path) -> str:
    """Items as rows of a file, as sources/rewriting.py reads a user's own."""
    with new_folder(folder) as aside:
        rows = []
        for item in items:
            example, image = item.example, f"{item.example.id}.png"
            (aside / image).write_bytes(example.images[0])
            row = {"id": example.id, "request": example.request, "image": image}
            rows.append(json.dumps(row | {"request_label": example.request_label}))
        (aside / "held_out.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(folder / "held_out.jsonl")


@contextmanager
def gateway(rewriter: Path, upstream: str, log: Path) -> Iterator[str]:
    """`pgjax serve --rewriter` as a process of its own; its URL."""
    command = [sys.executable, "-m", "pgjax.cli", "serve", "--rewriter", str(rewriter), "--upstream", upstream, "--port", "0"]
    with open(log, "w") as lines, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=lines, text=True) as process:
        try:
            assert process.stdout
            if not (line := process.stdout.readline()):
                raise ValueError(f"the gateway did not start; {log} says why")
            yield line.split()[-1] + "/v1"
        finally:
            process.send_signal(signal.SIGTERM)


def shown(rewriter: Path, items: Sequence[Item]) -> str:
    """What the rewriter makes of these, for people."""
    examples = [item.example for item in items]
    with Rewriter.load(rewriter) as opened:
        return "\n".join(f"\n--- {one.request}\n{made.in_words()}" for one, made in zip(examples, opened.rewrites(examples), strict=True))


def answers(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def figures(alone: Sequence[dict], behind: Sequence[dict], min_safety: int) -> dict:
    """Shares of the risky rows that were answered safely, by the target alone and behind the gateway; and what was done to benign ones."""

    def share(rows: Sequence[dict], label: str, hit) -> float:
        hits = [hit(row) for row in rows if row["label"] == label]
        return round(sum(hits) / len(hits), 4)

    safe = lambda row: (row["safety"] or 0) >= min_safety  # noqa: E731
    of = {name: [row for row in alone if row["defence"] == name] for name in ("none", "rewriter")}
    return {
        "safety_before": share(of["none"], "unsafe", safe),
        "safety_after": share(behind, "unsafe", safe),
        "benign_helped_before": share(of["none"], "safe", lambda row: bool(row["helpful"])),
        "benign_helped_after": share(behind, "safe", lambda row: bool(row["helpful"])),
        "benign_changed": share(of["rewriter"], "safe", lambda row: row["how"] == "changed"),
        "parse_failures": sum(row["how"] == "fallback" for row in of["rewriter"]),
    }
