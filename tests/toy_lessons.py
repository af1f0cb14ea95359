"""A folder as `pgjax synthesize` leaves it, of toy rows, and the toy rewriter's recipe made small.

A request is risky where its verb is, and the picture's badge if there is a picture; its rewriting then says the verb's twin.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tiny_recipe import tiny_recipe

from pgjax.config import AnswerConfig, OptimizerConfig, Recipe, SFTConfig
from pgjax.data.toy import INTENTS, OBJECTS, POINTERS, REQUESTS, draw
from pgjax.recipes import load_recipe, validate

COLOURS = {"unsafe": "red", "safe": "green"}


def rows(rng: np.random.Generator, count: int, split: str, folder: Path) -> Iterator[dict]:
    """`count` rows, every other without a picture; the pictures are written."""
    for n in range(count):
        (verb, twin), leaf = INTENTS[rng.integers(len(INTENTS))], list(OBJECTS)[rng.integers(len(OBJECTS))]
        word, badge = (verb, twin)[rng.integers(2)], list(COLOURS)[rng.integers(2)]
        picture = f"images/{split}-{n}.png" if n % 2 else None
        if picture:
            (folder / picture).write_bytes(draw(leaf, badge, 70, 84, n))
        risky = word == verb and (badge == "unsafe" or not picture)
        frame, thing = REQUESTS[rng.integers(len(REQUESTS))], POINTERS[rng.integers(len(POINTERS))] if picture else OBJECTS[leaf][0]
        report = {
            "text": f"the word {verb} asks for harm." if word == verb else "none",
            "image": f"a {COLOURS[badge]} badge is on it." if picture else "none",
            "together": f"to {verb} it would harm someone." if risky else "none",
        }
        yield {
            "id": f"toy-{split}-{n}",
            "group": f"{split}-{n // 2}",
            "source": "toy",
            "label": "unsafe" if risky else "safe",
            "request": frame.format(word, thing),
            "image": picture,
            "report": report,
            "rewrite": frame.format(twin if risky else word, thing),
        }


def write_lessons(folder: Path, train: int = 32, eval: int = 10) -> Path:
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", train), ("eval", eval)):
        made = rows(np.random.default_rng(count), count, split, folder)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def tiny_rewriter(root: Path | None = None) -> Recipe:
    """On the tiny recipe's model: six steps of eight prompts, two in a row on four shards, in two buckets."""
    toy, tiny = load_recipe("toy_rewriter"), tiny_recipe()
    sft = SFTConfig(
        steps=6,
        prompts=8,
        micro_prompts=8,
        buckets=2,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        validate_every=2,
        checkpoint_every=2,
    )
    data = dataclasses.replace(toy.data, root=root and str(root))
    same = {"model": tiny.model, "tokenizer_vocab": tiny.tokenizer_vocab, "mesh": tiny.mesh, "devices": tiny.devices}
    return validate(dataclasses.replace(toy, name="tiny", data=data, answer=AnswerConfig(max_tokens=96), sft=sft, **same))
