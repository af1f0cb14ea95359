"""Subcommands for datasets: build one, look at it; docs/data.md."""

import argparse
import asyncio
import json
import sys
from functools import partial
from pathlib import Path

from pgjax.commands.start import no_more, start_jax


def data(args: argparse.Namespace, rest: list[str]) -> None:
    {"build": build, "stats": stats, "show": show}[args.action](args, rest)


def build(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.data.dataset import Dataset, validate
    from pgjax.recipes import load_config, override

    config = validate(override(load_config(args.config, Dataset), rest))
    start_jax(0)
    from pgjax.data.card import tables
    from pgjax.data.make import build
    from pgjax.pages.tables import plain
    from pgjax.serving.endpoints import open_endpoints

    replies = config.folder.with_name(f"{config.folder.name}-replies")
    judges = partial(open_endpoints, config.vote.judges, config.vote.limits, replies, args.allow_remote)
    asyncio.run(build(config, judges, lambda card: print(plain([], tables(card)), flush=True)))
    print(f"dataset: {config.folder}; its card.md says of what")


def stats(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.data.stats import stats
    from pgjax.pages.tables import plain

    tables = stats(Path(args.folder), Path(args.model) if args.model else None)
    whole = {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in tables}
    print(json.dumps(whole) if args.json else plain([], tables), end="\n" if args.json else "")


def show(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.data.stats import Shown, find, gold, page
    from pgjax.files import replace_file

    example, shown = find(Path(args.folder), args.id), Shown(Path(args.model) if args.model else None)
    replace_file(Path(args.out), page(example, shown, veil=not args.reveal))
    print(json.dumps(gold(example), indent=1))
    if args.reveal:
        print(shown.text(example))
    print(f"page: {args.out}", file=sys.stderr)
