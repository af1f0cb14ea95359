"""How fast `pgjax data build` is and what memory it takes: rows in the format of ProGuard-Data, each with a JPEG of its own.

    python benchmarks/data_build.py --rows 100000

Pictures are noise of 448 x 336 pixels at four scales, as large as photographs; what makes each file its own is a comment in it.
"""

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pgjax.data.dataset import Dataset, Target
from pgjax.data.make import build
from pgjax.serving.endpoints import open_endpoints

BATCH = 1000
MODALITIES = ("text", "text-image", "image")


def pictures(rng: np.random.Generator, count: int) -> list[bytes]:
    made = []
    for _ in range(count):
        scales = [np.kron(rng.integers(0, 64, (336 // s, 448 // s, 3)), np.ones((s, s, 1))) for s in (112, 28, 7, 1)]
        out = BytesIO()
        Image.fromarray(sum(scales).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=60)
        made.append(out.getvalue())
    return made


def numbered(jpeg: bytes, number: int) -> bytes:
    """The same picture in a file of its own: a comment behind its first marker."""
    comment = str(number).encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + jpeg[2:]


def write_set(root: Path, rows: int) -> int:
    """Rows of all modalities in turn, pictures with two of three; returns the bytes written."""
    rng = np.random.default_rng(0)
    shown, words = pictures(rng, 40), [f"word{n}" for n in range(5000)]
    folder = root / "proguard_data"
    folder.mkdir(parents=True)
    for first in range(0, rows, BATCH):
        table: dict[str, list] = {
            key: [] for key in ("modality", "message", "query_label", "response_label", "category", "original_category", "image")
        }
        for n in range(first, min(first + BATCH, rows)):
            modality, unsafe = MODALITIES[n % 3], n % 2 == 0
            said = [" ".join(rng.choice(words, 40)) for _ in range(2)]
            table["modality"].append(modality)
            table["message"].append(
                json.dumps([{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)])
            )
            table["query_label"].append("unsafe" if unsafe else "safe")
            table["response_label"].append("safe")
            table["category"].append(f"C{n // 2 % 9 + 1}" if unsafe and modality == "text-image" else "C8S1" if unsafe else "")
            table["original_category"].append("")
            table["image"].append({"bytes": numbered(shown[n % len(shown)], n)} if modality != "text" else None)
        pq.write_table(pa.table(table), folder / f"{first // BATCH:04d}.parquet")
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_set(root, rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        targets = tuple(Target(modality, rows, split=split) for split in ("train", "eval") for modality in ("text", "text_image", "image"))
        config = Dataset("speed", ("proguard_data",), targets=targets, root=folder, out=str(root / "out"))
        began = time.perf_counter()
        card = asyncio.run(build(config, partial(open_endpoints, (), config.vote.limits, root / "replies", False), lambda card: None))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = sum(card["sources"]["proguard_data"]["chosen"].values())
    print(f"{rows} rows, {size / 2**30:.2f} GiB: {chosen} built in {seconds:.0f} s, {rows / seconds:.0f} rows/s; ", end="")
    print(f"peak memory {peak / 2**20:.2f} GiB, {before / 2**20:.2f} before", file=sys.stdout)


if __name__ == "__main__":
    main()
