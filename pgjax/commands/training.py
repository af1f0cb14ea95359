"""Subcommands that train, and that look at what training uses or has left."""

import argparse
import dataclasses
import json
from pathlib import Path

from pgjax.commands.start import no_more, recipe_of, start_jax, started
from pgjax.config import Recipe
from pgjax.parallel.start import first_alone


def train(args: argparse.Namespace, rest: list[str]) -> None:
    recipe = recipe_of(args, rest)
    with started(recipe.devices, args) as first:
        from pgjax.grpo.trainer import train

        run = run_folder(recipe, args, first)
        show(train(recipe, run, args.fresh, args.profile), run, first)


def sft(args: argparse.Namespace, rest: list[str]) -> None:
    recipe = recipe_of(args, rest)
    with started(recipe.devices, args) as first:
        from pgjax.rewriter.lessons import read_lessons
        from pgjax.sft.trainer import train

        run = run_folder(recipe, args, first)
        show(train(recipe, run, *read_lessons(recipe.data), args.fresh), run, first)


def run_folder(recipe: Recipe, args: argparse.Namespace, first: bool) -> Path:
    """Where the run lies, its later checkpoints dropped by the first process where that was asked for."""
    from pgjax.train.checkpoints import go_back
    from pgjax.train.run_folder import check_same_run

    run = Path(args.runs) / recipe.name
    with first_alone():
        if first and args.go_back is not None:
            check_same_run(run, recipe)
            go_back(run / "checkpoints", args.go_back)
    return run


def show(summary: dict, run: Path, first: bool) -> None:
    """At the end of a run, by the first of its processes."""
    if first:
        print(json.dumps(summary, indent=2))
        print(f"run: {run}")


def plan(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.plan.chips import describe, parse_topology, prepare

    topology = parse_topology(args.topology)
    recipe = recipe_of(args, ["--devices", str(topology.count), *rest])
    if recipe.data.name == "rewriter":
        raise ValueError(
            f"`pgjax plan` plans steps of GRPO; recipe {recipe.name} takes none, as `pgjax sft` trains it (data.name rewriter)"
        )
    start_jax(prepare(topology))
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # what was compiled for hardware that is not here cannot be loaded
    from pgjax.plan.plan import plan
    from pgjax.plan.table import table

    found = plan(recipe, topology, describe(topology))
    print(json.dumps(found) if args.json else table(found))


def demo(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.demo import demo

    recipe = dataclasses.replace(recipe_of(args, rest), name="demo")  # a folder of its own: each demo starts over
    start_jax(recipe.devices)
    demo(recipe, Path(args.runs) / recipe.name)


def score(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    start_jax(0)
    import jax

    from pgjax.completions import open_model, read_row, score_rows
    from pgjax.data.jsonl import read_jsonl

    jax.config.update("jax_default_matmul_precision", "highest" if args.dtype == "float32" else None)  # accelerators would round
    lines = read_jsonl(args.jsonl)
    setup, params, tokenizer = open_model(Path(args.model), args.dtype, args.max_pixels)
    rows = [read_row(line, tokenizer, setup.model.config) for line in lines]
    for row in score_rows(rows, setup, params, tokenizer):
        mean = sum(row["logprobs"]) / len(row["tokens"])
        words = f"{row['id']}: {len(row['tokens'])} tokens, mean logprob {mean:.4f}, perplexity {row['perplexity']:.4g}"
        print(json.dumps(row) if args.json else words, flush=True)


def export(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    start_jax(0)
    from pgjax.export import export

    print(f"checkpoint: {export(Path(args.run_folder), Path(args.folder), args.best, args.dtype)}")


def reward(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    start_jax(0)
    from pgjax.data.jsonl import read_jsonl
    from pgjax.explain import explain, table
    from pgjax.taxonomy import load_taxonomy

    taxonomy = load_taxonomy(args.taxonomy)
    explained = explain(read_jsonl(args.jsonl), taxonomy, args.variant, args.think_tag, args.embedder, args.bank)
    print(json.dumps(explained) if args.json else table(explained))


def bank(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    start_jax(0)
    from pgjax.bank import build_bank, calibrate, load_bank, save_bank
    from pgjax.models.sentence_encoder import load_embedder
    from pgjax.taxonomy import load_taxonomy

    taxonomy, embedder = load_taxonomy(args.taxonomy), load_embedder(args.embedder)
    exclude = tuple(args.exclude)
    made = build_bank(taxonomy, embedder, exclude) if args.action == "build" else load_bank(args.bank, taxonomy, embedder, exclude)
    if args.action == "calibrate":
        made, report = calibrate(made, taxonomy)
        print("\n".join(report.lines()))
    save_bank(args.bank, made)
    print(f"bank: {args.bank}")


def report(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.sft import report as sft
    from pgjax.train import report as grpo
    from pgjax.train.run_folder import read_config

    run, recipe = Path(args.folder), read_config(args.folder)
    page = sft.write_report(run) if recipe.data.name == "rewriter" else grpo.write_report(run, recipe.shows_content)
    print(f"report: {page}")
