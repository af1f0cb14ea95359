"""The `pgjax` command: one function per subcommand. Exit status 0 done, 2 wrong usage or input (one line on stderr), 1 failure."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def start_jax(devices: int) -> None:
    """Before the first use of a device: simulated CPU devices if asked for, and the persistent compilation cache."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    from pgjax.train.materials import cache_dir

    if devices:
        # With XLA's concurrent schedule, simulated devices reach independent collectives in different orders and wait for ever; so they
        # do when one device's waiting collectives take all threads of a pool that has one for each device (unless NPROC says more).
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ.setdefault("NPROC", str(8 * devices))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def recipe_of(args: argparse.Namespace, rest: list[str]):
    from pgjax.recipes import load_recipe, override, validate

    return validate(override(load_recipe(args.config), rest))


def train(args: argparse.Namespace, rest: list[str]) -> None:
    recipe = recipe_of(args, rest)
    start_jax(recipe.devices)
    from pgjax.grpo.trainer import train

    run = Path(args.runs) / recipe.name
    if args.fresh:
        shutil.rmtree(run, ignore_errors=True)
    summary = train(recipe, run)
    print(json.dumps(summary, indent=2))
    print(f"run: {run}")


def demo(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.demo import demo

    recipe = recipe_of(args, rest)
    start_jax(recipe.devices)
    demo(recipe, Path(args.runs) / recipe.name)


def moderate(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.train.run_folder import read_config

    start_jax(read_config(args.model).devices)
    from pgjax.serving.guard import Guard, conversation

    image = read_bytes(args.image) if args.image else None
    example = conversation(args.request, args.response, image)
    (verdict,) = Guard.load(Path(args.model), args.policy and Path(args.policy)).moderate([example], args.categories)
    print(json.dumps(verdict, ensure_ascii=False) if args.json else readable(verdict))


def readable(verdict: dict) -> str:
    """A verdict for people."""
    lines = [f"request:  {verdict['request']}"]
    lines += [f"response: {verdict['response']}"] if verdict["response"] else []
    if verdict["category_id"]:
        lines.append(f"category: {verdict['category_id']} {verdict['category_name']}")
    elif verdict["category_name"]:
        lines.append(f"category: {verdict['category_name']} (its own words: not in the policy)")
    lines.append(f"because:  {verdict['reasoning']}")
    return "\n".join(lines + (["(toy model: not a guard)"] if verdict["not_a_guard"] else []))


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


def read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def no_more(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; see --help")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="pgjax", description="A proactive vision-language safety guard, trained by GRPO in JAX.")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    for name, run, text in (
        ("train", train, "train a recipe by GRPO; goes on from the last checkpoint; --KEY VALUE overrides any recipe value"),
        ("demo", demo, "train the toy recipe, evaluate before and after, and moderate three inputs"),
    ):
        sub = command(name, run, text)
        sub.add_argument("config", nargs="?" if name == "demo" else None, default="toy", help="a name in configs/ or a path")
        sub.add_argument("--runs", default="runs", help="folder of run folders")
        if name == "train":
            sub.add_argument("--fresh", action="store_true", help="drop an earlier run of this name")
    sub = command("moderate", moderate, "a verdict on one conversation")
    sub.add_argument("--model", required=True, help="run folder")
    for flag, text in (("request", "user text"), ("response", "agent text"), ("image", "file"), ("policy", "taxonomy file of your own")):
        sub.add_argument(f"--{flag}", help=text)
    sub.add_argument("--categories", nargs="*", default=[], help="ids that the prompt's policy lists; default all")
    sub.add_argument("--json", action="store_true", help="one JSON object")
    sub = command("bank", bank, "build a synonym bank, or set its thresholds from its own similarities")
    sub.add_argument("action", choices=("build", "calibrate"))
    sub.add_argument("--bank", default="bank.npz", help="the file to write (and, to calibrate, to read)")
    sub.add_argument("--taxonomy", help="YAML file; default the packaged one")
    sub.add_argument("--embedder", help="sentence-transformers folder; default the MiniLM package")
    sub.add_argument("--exclude", nargs="*", default=[], help="ids without a bank row")
    return main


def main(argv: list[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    try:
        args.run(args, rest)
    except ValueError as error:
        print(f"pgjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
