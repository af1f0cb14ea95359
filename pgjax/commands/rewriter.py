"""Subcommands of the rewriter: its data, its use, its evaluation; docs/rewriter.md."""

import argparse
import json
from pathlib import Path

from pgjax.commands.start import no_more, recipe_of, start_jax


def synthesize(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.recipes import load_config, override
    from pgjax.rewriter.config import Synthesis, validate

    config = validate(override(load_config(args.config, Synthesis), rest))
    start_jax(0)
    import asyncio

    from pgjax.rewriter.synthesis import summary, synthesize

    print(summary(asyncio.run(synthesize(config, args.allow_remote))))
    print(f"data: {config.folder}")


def rewrite(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.data.images import read_image
    from pgjax.data.jsonl import read_jsonl

    if bool(args.jsonl) == bool(args.request or args.image):
        raise ValueError("give either --jsonl with its own requests, or --request, --image or both")
    start_jax(0)
    from pgjax.data.rows import conversation, conversation_of
    from pgjax.rewriter.rewriter import Rewriter

    lines = read_jsonl(args.jsonl) if args.jsonl else []
    examples = [conversation_of(line, ("id", "request", "image")) for line in lines]
    if not lines:
        examples = [conversation(args.request, None, read_image(args.image) if args.image else None)]
    ids = [line.row.get("id", line.number) for line in lines] or [None]
    with Rewriter.load(Path(args.model), args.best, rows=args.rows, prompt_tokens=args.prompt_tokens) as rewriter:
        for id, made in zip(ids, rewriter.rewrites(examples), strict=True):
            row = ({"id": id} if lines else {}) | made.as_json()
            print(json.dumps(row) if args.json or lines else made.in_words(), flush=True)


def evaluate_rewriter(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.endpoint import Limits

    limits = Limits(args.concurrency, args.per_minute, args.timeout)
    start_jax(0)
    from pgjax.rewriter.evaluate import Job, run

    rewriter = Path(args.rewriter) if args.rewriter else None
    rest_of = {name: getattr(args, name) for name in ("data", "limit", "allow_remote", "seed", "reveal")}
    job = Job(args.benchmark, args.target, args.judge, Path(args.out), args.defence, rewriter, limits=limits, **rest_of)
    summary, text = run(job)
    print(json.dumps(summary) if args.json else text, end="\n" if args.json else "")


def demo_rewriter(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.recipes import load_config
    from pgjax.rewriter.config import Synthesis

    args.config = "toy_rewriter"
    recipe, synthesis = recipe_of(args, rest), load_config("toy_synthesis", Synthesis)
    start_jax(recipe.devices)
    from pgjax.rewriter.demo import demo

    demo(recipe, synthesis, Path(args.runs) / "demo-rewriter")
