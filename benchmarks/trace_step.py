"""Where the devices wait: the programs of a step in the trace that `pgjax train RECIPE --profile` writes.

    python benchmarks/trace_step.py runs/NAME [--json]

The trace has every operation of every program with its times. `busy_s` is the time in which at least one device works on the program,
`gap_s` that in which none works on anything and which an operation of it ends: it waited for the host. The last row is the whole trace.
"""

import argparse
import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from timing import show

Span = tuple[float, float]


def union(spans: list[Span]) -> list[Span]:
    """Overlapping spans as one."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def summarise(events: list[dict]) -> list[dict]:
    """Rows {program, begins_s, busy_s, gap_s}, by their beginning, from the events of a trace (times in microseconds)."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if (program := event.get("args", {}).get("hlo_module")) and event["ph"] == "X":
            spans[program.removeprefix("jit_")].append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    if not spans:
        raise ValueError("no operation of a program in this trace")
    everything = union([span for of_program in spans.values() for span in of_program])
    first, last = everything[0][0], everything[-1][1]
    length = lambda joined: sum(end - begin for begin, end in joined)  # noqa: E731
    idle_before = {begin: begin - end for (_, end), (begin, _) in pairwise(everything)}
    rows = []
    for program, of_program in sorted(spans.items(), key=lambda item: min(item[1])):
        joined = union(of_program)
        gap = sum(idle_before.get(begin, 0.0) for begin, _ in joined)
        rows.append({"program": program, "begins_s": joined[0][0] - first, "busy_s": length(joined), "gap_s": gap})
    return [*rows, {"program": "all", "begins_s": 0.0, "busy_s": length(everything), "gap_s": last - first - length(everything)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    files = sorted((args.run / "profile").rglob("perfetto_trace.json.gz"))
    if not files:
        parser.error(f"{args.run} has no profile/**/perfetto_trace.json.gz: run `pgjax train ... --profile`")
    with gzip.open(files[-1]) as file:
        rows = summarise(json.load(file)["traceEvents"])
    show(rows, args.json, f"Programs of one step and idle time of the devices before them ({args.run}), seconds.")


if __name__ == "__main__":
    main()
