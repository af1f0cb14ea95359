"""The `pgjax` command: one function per subcommand. Exit status 0 done, 2 wrong usage or input (one line on stderr), 1 failure."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


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

    recipe = load_recipe(args.config)
    if folder := override(recipe, rest).checkpoint:
        from pgjax.models.hf_config import with_checkpoint

        recipe = with_checkpoint(dataclasses.replace(recipe, checkpoint=folder))
    return validate(override(recipe, rest))


def train(args: argparse.Namespace, rest: list[str]) -> None:
    recipe = recipe_of(args, rest)
    start_jax(recipe.devices)
    from pgjax.grpo.trainer import train

    run = Path(args.runs) / recipe.name
    summary = train(recipe, run, args.fresh, args.profile)
    print(json.dumps(summary, indent=2))
    print(f"run: {run}")


def demo(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.demo import demo

    recipe = dataclasses.replace(recipe_of(args, rest), name="demo")  # a folder of its own: each demo starts over
    start_jax(recipe.devices)
    demo(recipe, Path(args.runs) / recipe.name)


def moderate(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.data.images import read_image
    from pgjax.data.jsonl import read_jsonl

    if args.jsonl and (args.request or args.response or args.image):
        raise ValueError("--jsonl brings its own conversations; leave out --request, --response and --image")
    if args.out and not args.jsonl:
        raise ValueError("--out is for the rows of a file; give --jsonl too")
    start_jax(0)
    from pgjax.data.rows import conversation, conversation_of
    from pgjax.serving.batch import moderate_rows
    from pgjax.serving.guard import Guard, How

    lines = read_jsonl(args.jsonl) if args.jsonl else []
    if not args.jsonl:
        examples = [conversation(args.request, args.response, read_image(args.image) if args.image else None)]
    elif not args.out:
        examples = [conversation_of(line) for line in lines]
    own = read_policy(args.policy)
    how = How(args.mode, args.samples, args.threshold, args.fail_open)
    with Guard.load(Path(args.model), args.best, rows=args.rows, bound=not args.unbound) as guard:
        policy = guard.policy(args.categories, own)
        if args.out:
            job = {"model": str(Path(args.model).resolve()), "policy": own, "categories": args.categories, "unbound": args.unbound}
            print(json.dumps(moderate_rows(guard, lines, policy, how, Path(args.out), job)))
            return
        ids = [line.row.get("id", line.number) for line in lines] or [None]
        for id, verdict in zip(ids, guard.verdicts(examples, policy, how), strict=True):
            named = {"id": id} if args.jsonl else {}
            print(json.dumps(named | verdict) if args.json else readable(named | verdict), flush=True)


def serve(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    key = read_key(args.api_key_file)
    if args.host not in ("127.0.0.1", "localhost", "::1") and key is None and not args.no_key:
        raise ValueError(f"--host {args.host} lets other machines in: give --api-key-file or PGJAX_API_KEY, or say --no-key")
    start_jax(0)
    from pgjax.serving.guard import Guard, How
    from pgjax.serving.requests import Limits
    from pgjax.serving.server import listen, run
    from pgjax.serving.service import Service, Serving

    sizes = (args.max_body << 20, args.max_images, args.max_megapixels << 20, args.max_text, args.max_policy, args.max_inputs)
    limits = Limits(*sizes, args.timeout)
    how = How(args.mode, args.samples, args.threshold, args.fail_open)
    name, hosts = args.name or Path(args.model).resolve().name, frozenset(args.allow_image_host)
    serving = Serving(name, how, read_policy(args.policy), tuple(args.categories), limits, key, hosts, args.drain)
    with (
        listen(args.host, args.port) as sock,
        Guard.load(Path(args.model), args.best, rows=args.rows, queue=args.queue, bound=not args.unbound) as guard,
    ):
        run(Service(guard, serving), sock)


def read_key(file: str | None) -> str | None:
    """The API key from a file, or else from the environment."""
    if file is None:
        return os.environ.get("PGJAX_API_KEY") or None
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {file} cannot be read as ASCII text: {getattr(error, 'strerror', None) or error}") from error
    if not key or any(character.isspace() for character in key):
        raise ValueError(f"--api-key-file {file} must hold one word, the key")
    return key


def read_policy(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--policy {file} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error


def readable(verdict: dict) -> str:
    """A verdict for people."""
    from pgjax.serving.verdict import printable

    lines = [f"--- {printable(str(verdict['id']), 80)}"] if "id" in verdict else []
    why = {"failure": " (no answer is in format: the guard fails closed)", "score": f" (score, from {verdict['threshold']})"}
    lines.append(f"verdict:  {'flagged' if verdict['flagged'] else 'passed'}{why.get(verdict['flagged_by'], '')}")
    for line in ("request", "response"):
        score = verdict["scores"][line]
        calibrated = "" if verdict["calibrated"] else ", not calibrated"
        sure = "" if score is None else f"  (unsafe: {score:.2f}{calibrated})"
        lines += [f"{line + ':':<9} {verdict[line]}{sure}"] if verdict[line] else []
    if verdict["category_id"]:
        lines.append(f"category: {verdict['category_id']} {verdict['category_name']}")
    elif verdict["category_name"]:
        lines.append(f"category: {verdict['category_name']} (its own words: not in the policy)")
    lines += [f"because:  {verdict['reasoning']}"] if verdict["reasoning"] else []
    return "\n".join(lines + (["(toy model: not a guard)"] if verdict["not_a_guard"] else []))


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
    from pgjax.train.report import write_report
    from pgjax.train.run_folder import read_config

    print(f"report: {write_report(Path(args.folder), read_config(args.folder).shows_content)}")


def no_more(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; see --help")


class Parser(argparse.ArgumentParser):
    """Wrong usage is an error like any other: one line, no page of usage above it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    main = Parser(prog="pgjax", description="A proactive vision-language safety guard, trained by GRPO in JAX.")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)  # --f is not --fresh, which deletes
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
            sub.add_argument("--profile", action="store_true", help="write a trace of one step into the run's folder profile/")

    def guarding(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        """A command that judges."""
        sub = command(name, run, text)
        sub.add_argument("--model", required=True, help="run folder, or Hugging Face checkpoint directory")
        sub.add_argument("--best", action="store_true", help="a run's checkpoint with the highest held-out request F1; default the newest")
        sub.add_argument("--rows", type=int, default=8, help="answers that are decoded at a time")
        sub.add_argument("--unbound", action="store_true", help="answers are not held to the format, to measure what that changes")
        sub.add_argument("--mode", choices=("think", "fast"), default="think", help="fast: without reasoning")
        sub.add_argument("--samples", type=int, default=1, help="answers to a conversation, drawn, that vote; 1: one greedy answer")
        sub.add_argument("--threshold", type=float, help="of the unsafe score; default the calibrated one, without one the labels decide")
        sub.add_argument("--fail-open", action="store_true", help="an answer that does not parse passes; default: it is flagged")
        return sub

    sub = guarding("moderate", moderate, "verdicts on conversations: one from the flags, or those of a file")
    for flag, text in (("request", "user text"), ("response", "agent text"), ("image", "file")):
        sub.add_argument(f"--{flag}", help=text)
    sub.add_argument("--jsonl", help="conversations, one JSON object a line: request, response, image (a path beside the file), id")
    sub.add_argument("--out", help="folder for the verdicts of --jsonl and for its errors; goes on where it was killed")
    sub.add_argument("--policy", help="categories of your own: YAML or JSON, a list of categories or of names")
    sub.add_argument("--categories", nargs="*", default=[], help="ids that the prompt's policy lists; default all")
    sub.add_argument("--json", action="store_true", help="one JSON object a conversation")
    sub = guarding("serve", serve, "the guard behind HTTP, in the shapes of OpenAI's API; docs/serving.md")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a key")
    sub.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    sub.add_argument("--name", help="of the model, for clients; default the folder's")
    sub.add_argument("--queue", type=int, default=64, help="requests that may wait; more are told to come again (429)")
    sub.add_argument("--policy", help="categories of your own, for requests that bring none: YAML or JSON")
    sub.add_argument("--categories", nargs="*", default=[], help="ids that the policy lists where a request says nothing; default all")
    sub.add_argument("--api-key-file", help="file with the key that clients must send; default the variable PGJAX_API_KEY, else none")
    sub.add_argument("--no-key", action="store_true", help="let other machines in without a key")
    sub.add_argument("--allow-image-host", nargs="*", default=[], metavar="HOST", help="https hosts whose images are fetched; default none")
    sub.add_argument("--timeout", type=float, default=60.0, help="seconds to an answer; a request may ask for less")
    sub.add_argument("--drain", type=float, default=60.0, help="seconds that requests under way get when the server is stopped")
    sub.add_argument("--max-body", type=int, default=20, metavar="MIB", help="of a request")
    sub.add_argument("--max-images", type=int, default=4, help="of a conversation; /v1/moderations takes one")
    sub.add_argument("--max-megapixels", type=int, default=16, help="of an image, as it is sent")
    sub.add_argument("--max-text", type=int, default=100_000, metavar="CHARACTERS", help="of a conversation")
    sub.add_argument("--max-policy", type=int, default=20_000, metavar="CHARACTERS", help="of a request's own policy")
    sub.add_argument("--max-inputs", type=int, default=32, help="texts of one call of /v1/moderations")
    sub = command("score", score, "log-probabilities of given completions, token by token")
    sub.add_argument("--model", required=True, help="Hugging Face checkpoint directory, or run folder")
    sub.add_argument("--jsonl", required=True, help="rows {messages, completion, id}; an image part is a path beside the file")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    sub.add_argument("--max-pixels", type=int, help="cap on a picture's area, beside a checkpoint directory; a run has its own")
    sub.add_argument("--json", action="store_true", help="one JSON object a row, with tokens and logprobs")
    sub = command("export", export, "write a run as a Hugging Face checkpoint directory")
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument("folder", metavar="DIR", help="the directory to make")
    sub.add_argument("--best", action="store_true", help="the checkpoint with the highest held-out request F1; default the newest")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the files; default the recipe's compute type")
    sub = command("reward", reward, "the reward of given answers, term by term")
    sub.add_argument("--jsonl", required=True, help="answers with their gold labels, one JSON object a line")
    sub.add_argument("--variant", choices=("published", "strict"), default="strict", help="the released rules, or ours (default)")
    sub.add_argument("--json", action="store_true", help="one JSON object")
    sub.add_argument("--think-tag", choices=("think", "thinking"), default="think", help="the tag that answers reason in")
    sub.add_argument("--taxonomy", help="YAML file; default the packaged one")
    sub.add_argument("--embedder", help="sentence-transformers folder; default the MiniLM package")
    sub.add_argument("--bank", help="file made by `pgjax bank`: its thresholds, and its rows for names without synonyms")
    sub = command("bank", bank, "build a synonym bank, or set its thresholds from its own similarities")
    sub.add_argument("action", choices=("build", "calibrate"))
    sub.add_argument("--bank", default="bank.npz", help="the file to write (and, to calibrate, to read)")
    sub.add_argument("--taxonomy", help="YAML file; default the packaged one")
    sub.add_argument("--embedder", help="sentence-transformers folder; default the MiniLM package")
    sub.add_argument("--exclude", nargs="*", default=[], help="ids without a bank row")
    sub = command("report", report, "write report.html of a run folder anew")
    sub.add_argument("folder", metavar="RUN", help="run folder")
    return main


def main(argv: list[str] | None = None) -> int:
    try:
        args, rest = parser().parse_known_args(argv)
        args.run(args, rest)
    except ValueError as error:
        print(f"pgjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
