"""How fast the data pipeline is, what it pads, and whether its memory stays flat; beside what a trainer consumes.

    nice python benchmarks/data_pipeline.py [--recipe proguard_7b|toy] [--buckets 1 2 4] [--workers 1 2] [--prompts 16] [--json]

Rows are the recipe's where it generates them, else those of the public mix below $PGJAX_DATA, built and read as in a run: ArrayRecord
files with the pictures' bytes, the recipe's prompts, resizing and bounds. Tokens are those of a byte-level BPE trained on the rows, whose
prompts are a little longer than by a released tokenizer. One epoch for each number of buckets and workers; MB of a batch, and the most
that was resident in each half of the epoch. What a trainer consumes at most: the recipe's step at the dense peak of eight H100, all
answers of 300 tokens, by FLOPs alone (docs/performance.md); a real step takes longer.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from pgjax.config import Recipe
from pgjax.data.build import build_dataset, read_dataset
from pgjax.data.pipeline import Pipeline
from pgjax.data.toy import toy_texts
from pgjax.recipes import load_recipe
from pgjax.taxonomy import load_taxonomy
from pgjax.tokenizer import train_byte_bpe
from pgjax.train.flops import PEAKS, matmul_weights, phase_metrics
from pgjax.train.materials import grid, make_examples

VOCAB, ANSWER, DEVICES = 8192, 300, 8
HEAD = ("buckets", "workers", "rows/s", "images/s", "padding", "patch padding", "MB", "most RSS, first half", "second half")


def resident() -> float:
    """MB that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def with_data(recipe: Recipe, **data) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))


def epoch(pipeline: Pipeline, prompts: int, most: int) -> dict[str, float]:
    """One pass, at most so many batches."""
    batches = min(max(len(pipeline) // prompts, 1), most)
    pipeline.batch(0, prompts)  # the order of the epoch, imports
    images, used, slots, held, size = 0, np.zeros(2), np.zeros(2), [], 0
    began = time.monotonic()
    for k in range(batches):
        batch = pipeline.batch(k, prompts)
        prompt = batch.prompt
        images += sum(len(example.images) for example, _ in batch.rows)
        used += prompt.length_P.sum(), (prompt.image_PI >= 0).sum()
        slots += prompt.tokens_PT.size, prompt.image_PI.size
        size += sum(x.nbytes for x in vars(prompt).values())
        held.append(resident())
    seconds = time.monotonic() - began
    tokens, patches = used / (batches * prompts)
    padding, patch_padding = 1 - used / slots
    return {
        "rows/s": batches * prompts / seconds,
        "images/s": images / seconds,
        "padding": padding,
        "patch padding": patch_padding,
        "MB": size / batches / 1e6,
        "most RSS, first half": max(held[: -(-batches // 2)]),
        "second half": max(held[batches // 2 :]),
        "tokens": tokens,
        "patches": patches,
    }


def consumed(recipe: Recipe, tokens: float, patches: float) -> float:
    """Prompts a second of a step at the peak of the devices."""
    P = recipe.grpo.prompts
    counts = {"patches": P * patches, "prompt": P * tokens, "response": P * recipe.rollout.group * min(ANSWER, recipe.answer.max_tokens)}
    counts |= {f"trained_{name}": value for name, value in counts.items()}
    seconds = dict.fromkeys(("step", "encode", "prefill", "decode", "score", "reward", "update"), 1.0)
    metrics = phase_metrics(recipe, matmul_weights(recipe.model), seconds, counts, DEVICES, None)
    flops = sum(value for name, value in metrics.items() if name.startswith("perf/flops/"))
    return P / (flops / (DEVICES * PEAKS["NVIDIA H100"]))


def measure(recipe: Recipe, buckets: list[int], workers: list[int], prompts: int, most: int = 10**9) -> tuple[list[dict], dict]:
    """A row for each number of buckets and of workers; facts about the rows and the start."""
    if recipe.data.name != "toy":
        recipe = with_data(recipe, name="public_mix")
    taxonomy = load_taxonomy(recipe.data.taxonomy)
    with tempfile.TemporaryDirectory() as folder:
        examples, _ = make_examples(recipe, taxonomy)
        build_dataset(examples, Path(folder) / "data")
        rows = read_dataset(Path(folder) / "data", "train")
        tokenizer = train_byte_bpe(toy_texts(rows, taxonomy, recipe), recipe.tokenizer_vocab or VOCAB)
        make = lambda **data: Pipeline(  # noqa: E731
            rows, taxonomy, tokenizer, with_data(recipe, **data), "train", grid(taxonomy), cache=Path(folder) / "fit.json"
        )
        began = time.monotonic()
        pipeline = make()
        notes = {
            "rows": len(pipeline),
            "dropped": dict(pipeline.dropped),
            "rows/s of the start": len(pipeline) / (time.monotonic() - began),
        }
        table = [{"buckets": b, "workers": w, **epoch(make(buckets=b, workers=w), prompts, most)} for b in buckets for w in workers]
        notes["buckets"] = [make(buckets=b).padding() for b in buckets]
    notes["prompts/s consumed"] = consumed(recipe, table[0]["tokens"], table[0]["patches"])
    return table, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="proguard_7b")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=16, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=10**9, help="at most so many of the epoch")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    table, notes = measure(load_recipe(args.recipe), args.buckets, args.workers, args.prompts, args.batches)
    if args.json:
        print(json.dumps({"rows": table, "notes": notes}))
        return
    print(f"{args.recipe}, batches of {args.prompts}: {notes['rows']} rows, dropped {notes['dropped']}; the start looks at ", end="")
    print(f"{notes['rows/s of the start']:.0f} rows a second")
    print(f"the step consumes at most {notes['prompts/s consumed']:.1f} prompts a second on {DEVICES} H100", *notes["buckets"], sep="\n")
    print("", *HEAD, "", sep=" | ")
    print("|" + "---|" * len(HEAD))
    for row in table:
        print("", *(f"{row[name]:.3g}" for name in HEAD), "", sep=" | ")


if __name__ == "__main__":
    main()
