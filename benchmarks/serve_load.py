"""A real `pgjax serve` under load: throughput and latency against concurrency, through real sockets.

    python benchmarks/serve_load.py --model runs/demo [--categories C1S1 C4S2 C8S1] [--concurrency 1 2 4 8 16] [--modes think fast]
                                    [--seconds 10] [--rows 8] [--queue 64] [--json]

So many clients, each with a connection of its own, ask /v1/guard one request after the other for so many seconds: the conversations of
the demo in turn (a text with a response, a text with an image, an image), every category scored. All run on the machine of the server
and share its cores with it.

* per_s: answers a second; p50_ms, p95_ms: from sending to the answer's last byte, of those that were answered;
* refused: told to come again (429), which ends a turn too; lost: anything else, an error or no answer at all;
* rss_mb: memory of the server afterwards; the first row is that of the server at rest, after a few answers.

RuntimeError where the server counts other answers than its clients do.
"""

import argparse
import asyncio
import base64
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import numpy as np
from timing import show

from pgjax.demo import SHOWN, inputs

READY = 300.0  # seconds that loading and compiling may take
WARM_UP = 3.0  # seconds


def bodies() -> list[dict]:
    url = lambda image: "data:image/png;base64," + base64.b64encode(image).decode()  # noqa: E731
    return [{"prompt": e.request, "response": e.response, "images": [url(image) for image in e.images]} for _, e in inputs()]


def rss_mb(pid: int) -> float:
    line = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(line[1]) / 1024 if line else float("nan")


async def load(base: str, mode: str, clients: int, seconds: float, asked: Sequence[dict]) -> tuple[list[float], int, int, float]:
    """Milliseconds of every answer, how many were refused and lost, and the seconds that it took."""
    answered: list[float] = []
    refused = lost = 0
    turn, began = itertools.cycle(asked), time.monotonic()

    async def client() -> None:
        nonlocal refused, lost
        async with httpx2.AsyncClient(base_url=base, timeout=120, trust_env=False) as http:
            while time.monotonic() < began + seconds:
                sent = time.monotonic()
                try:
                    answer = await http.post("/v1/guard", json=next(turn) | {"mode": mode})
                    known = answer.status_code == 200 and "flagged" in answer.json()
                except (httpx2.HTTPError, ValueError):
                    lost += 1
                    continue
                if known:
                    answered.append(1000 * (time.monotonic() - sent))
                elif answer.status_code == 429:
                    refused += 1
                    await asyncio.sleep(0.05)
                else:
                    lost += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return answered, refused, lost, time.monotonic() - began


def measure(base: str, pid: int, concurrency: Sequence[int], modes: Sequence[str], seconds: float, asked: Sequence[dict]) -> list[dict]:
    """Rows {mode, concurrency, per_s, p50_ms, p95_ms, answered, refused, lost, rss_mb}; the first is the server at rest."""
    rows: list[dict] = []
    for mode in modes:
        asyncio.run(load(base, mode, 2, WARM_UP, asked))  # compiles what this mode needs
        if not rows:
            empty = dict.fromkeys(("per_s", "p50_ms", "p95_ms"), 0.0) | dict.fromkeys(("answered", "refused", "lost"), 0)
            rows.append({"mode": "at rest", "concurrency": 0} | empty | {"rss_mb": rss_mb(pid)})
        for clients in concurrency:
            before = counted(base)
            answered, refused, lost, spent = asyncio.run(load(base, mode, clients, seconds, asked))
            if counted(base) - before != len(answered):
                raise RuntimeError(f"the server counts {counted(base) - before} answers, its clients {len(answered)}")
            p50, p95 = (float(np.percentile(answered, q)) if answered else float("nan") for q in (50, 95))
            times = {"per_s": len(answered) / spent, "p50_ms": p50, "p95_ms": p95}
            counts = {"answered": len(answered), "refused": refused, "lost": lost}
            rows.append({"mode": mode, "concurrency": clients} | times | counts | {"rss_mb": rss_mb(pid)})
    return rows


def counted(base: str) -> int:
    """Answers of /v1/guard, by the server's own count."""
    found = re.search(r'^pgjax_requests_total\{route="/v1/guard",status="200"\} (\S+)', httpx2.get(f"{base}/metrics").text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def wait_until_ready(base: str) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        try:
            if httpx2.get(f"{base}/readyz").status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server at {base} was not ready after {READY} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="run folder, or Hugging Face checkpoint directory")
    parser.add_argument("--categories", nargs="*", default=SHOWN, help="ids that the policy lists; empty: all")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--modes", nargs="+", choices=("think", "fast"), default=["think", "fast"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--rows", type=int, default=8, help="answers that the server decodes at a time")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pgjax.cli", "serve", "--model", args.model, "--port", "0"]
    command += ["--rows", str(args.rows), "--queue", str(args.queue), "--categories", *args.categories]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if not (said := server.stdout.readline() if server.stdout else ""):
            raise RuntimeError(f"the server did not start; try {' '.join(command)}")
        base = said.split()[-1]
        wait_until_ready(base)
        rows = measure(base, server.pid, args.concurrency, args.modes, args.seconds, bodies())
    finally:
        server.terminate()
        server.wait()
    show(rows, args.json, f"`pgjax serve` with {args.rows} rows, {args.seconds} seconds at each concurrency.")


if __name__ == "__main__":
    main()
