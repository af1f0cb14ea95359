"""The `pgjax` command: one function per subcommand. Exit status 0 done, 2 wrong usage or input (one line on stderr), 1 failure."""

import argparse
import dataclasses
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pgjax.arguments import parser


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


def sft(args: argparse.Namespace, rest: list[str]) -> None:
    recipe = recipe_of(args, rest)
    start_jax(recipe.devices)
    from pgjax.rewriter.lessons import read_lessons
    from pgjax.sft.trainer import train

    run = Path(args.runs) / recipe.name
    summary = train(recipe, run, *read_lessons(recipe.data), args.fresh)
    print(json.dumps(summary, indent=2))
    print(f"run: {run}")


def demo(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.demo import demo

    recipe = dataclasses.replace(recipe_of(args, rest), name="demo")  # a folder of its own: each demo starts over
    start_jax(recipe.devices)
    demo(recipe, Path(args.runs) / recipe.name)


def demo_rewriter(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.recipes import load_config
    from pgjax.rewriter.config import Synthesis

    args.config = "toy_rewriter"
    recipe, synthesis = recipe_of(args, rest), load_config("toy_synthesis", Synthesis)
    start_jax(recipe.devices)
    from pgjax.rewriter.demo import demo

    demo(recipe, synthesis, Path(args.runs) / "demo-rewriter")


def synthesize(args: argparse.Namespace, rest: list[str]) -> None:
    from pgjax.recipes import load_config, override
    from pgjax.rewriter.config import Synthesis, validate

    config = validate(override(load_config(args.config, Synthesis), rest))
    start_jax(0)
    import asyncio

    from pgjax.rewriter.synthesis import summary, synthesize

    print(summary(asyncio.run(synthesize(config, args.allow_remote))))
    print(f"data: {config.folder}")


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
    from pgjax.serving.guard import Guard
    from pgjax.train.saved import fingerprint

    lines = read_jsonl(args.jsonl) if args.jsonl else []
    if not args.jsonl:
        examples = [conversation(args.request, args.response, read_image(args.image) if args.image else None)]
    elif not args.out:
        examples = [conversation_of(line) for line in lines]
    own = read_policy(args.policy)
    how = judging(args)
    with Guard.load(Path(args.model), **loading(args)) as guard:
        policy = guard.policy(args.categories, own)
        if args.out:
            job = {"model": fingerprint(Path(args.model), args.best), "policy": own, "categories": args.categories}
            job |= {"calibration": guard.calibration and dataclasses.asdict(guard.calibration)}
            job |= {name: value for name, value in loading(args).items() if name != "rows"}
            print(json.dumps(moderate_rows(guard, lines, policy, how, Path(args.out), job)))
            return
        ids = [line.row.get("id", line.number) for line in lines] or [None]
        for id, verdict in zip(ids, guard.verdicts(examples, policy, how), strict=True):
            named = {"id": id} if args.jsonl else {}
            print(json.dumps(named | verdict) if args.json else readable(named | verdict), flush=True)


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
            row = ({"id": id} if lines else {}) | made._asdict() | {"report": made.report and made.report.model_dump()}
            print(json.dumps(row) if args.json or lines else readable_rewrite(row), flush=True)


def evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    start_jax(0)
    from pgjax.evaluation.command import run

    summary, text = run(Path(args.model), args, judging(args), loading(args))
    print(json.dumps(summary) if args.json else text, end="\n" if args.json else "")


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


def judging(args: argparse.Namespace) -> Any:
    """How a command is to judge."""
    from pgjax.serving.guard import How

    return How(args.mode, args.samples, args.threshold, args.fail_open)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Guard.load of a command that judges."""
    return {"best": args.best, "rows": args.rows, "bound": not args.unbound, "prompt_tokens": args.prompt_tokens}


def calibrate(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    from pgjax.data.jsonl import read_jsonl

    model = Path(args.model)
    page = Path(args.report) if args.report else model / "calibration.html"
    if args.max_fpr is not None and not 0 <= args.max_fpr < 1:
        raise ValueError(f"--max-fpr {args.max_fpr:g} must be at least 0 and below 1: a share of the safe conversations")
    lines, own = read_jsonl(args.jsonl), read_policy(args.policy)
    start_jax(0)
    from pgjax.data.rows import labelled
    from pgjax.evaluation import calibrate
    from pgjax.files import replace_file
    from pgjax.serving.calibration import write_calibration
    from pgjax.serving.guard import Guard, How
    from pgjax.train.saved import fingerprint

    weights = fingerprint(model, args.best)
    if not page.parent.is_dir() or page.is_dir():
        raise ValueError(f"the page cannot be written to {page}; give --report a file in a folder that is there")
    with Guard.load(model, calibrated=False, **loading(args)) as guard:
        policy = guard.policy(args.categories, own)
        examples = [labelled(line, policy.taxonomy, "eval") for line in lines]
        how = How(args.mode, args.samples, categories=False)
        made = calibrate.calibrate(guard, examples, policy, how, weights, args.max_fpr)
        shown = calibrate.page(made, model.resolve().name, guard.recipe.not_a_guard)
    replace_file(page, shown)
    print(f"{calibrate.summary(made)}\ncalibration: {write_calibration(model, made.calibration)}\npage: {page}")


def serve(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    key = read_key("--api-key-file", args.api_key_file, "PGJAX_API_KEY")
    if args.host not in ("127.0.0.1", "localhost", "::1") and key is None and not args.no_key:
        raise ValueError(f"--host {args.host} lets other machines in: give --api-key-file or PGJAX_API_KEY, or say --no-key")
    start_jax(0)
    target, bypass = gateway_of(args)
    from pgjax.serving.guard import Guard
    from pgjax.serving.requests import Limits
    from pgjax.serving.server import listen, run
    from pgjax.serving.service import Service, Serving

    sizes = (args.max_body << 20, args.max_bodies << 20, args.max_images, args.max_megapixels << 20)
    limits = Limits(*sizes, args.max_text, args.max_policy, args.max_inputs, args.timeout)
    name, hosts = args.name or Path(args.model or args.rewriter).resolve().name, frozenset(host.lower() for host in args.allow_image_host)
    serving = Serving(name, judging(args), read_policy(args.policy), tuple(args.categories), limits, key, hosts, args.drain)
    with ExitStack() as opened:
        sock = opened.enter_context(listen(args.host, args.port))
        guard = args.model and opened.enter_context(Guard.load(Path(args.model), queue=args.queue, **loading(args)))
        if not args.rewriter:
            return run(Service(guard, serving), sock)
        from pgjax.rewriter.gateway import ENDPOINTS, Gateway
        from pgjax.rewriter.rewriter import Rewriter

        own = {name: value for name, value in loading(args).items() if name != "bound"}
        rewriter = opened.enter_context(Rewriter.load(Path(args.rewriter), queue=args.queue, **own))
        run(Gateway(rewriter, serving, target, bypass, guard), sock, ENDPOINTS)


def gateway_of(args: argparse.Namespace) -> tuple[Any, str | None]:
    """The server behind the gateway, and the key for passing it by."""
    if not args.rewriter:
        if not args.model:
            raise ValueError("serve needs --model, a guard's folder, or --rewriter and --upstream")
        if args.upstream or args.upstream_key_file or args.bypass_key_file or args.allow_remote:
            raise ValueError("--upstream, --upstream-key-file, --bypass-key-file and --allow-remote are for a gateway; give --rewriter too")
        return None, None
    if not args.upstream:
        raise ValueError("--rewriter needs --upstream, the URL of the server that answers the rewritten requests")
    from pgjax.rewriter.upstream import Upstream, checked_url

    url, bypass = checked_url(args.upstream, args.allow_remote), read_key("--bypass-key-file", args.bypass_key_file)
    return Upstream(url, read_key("--upstream-key-file", args.upstream_key_file, "PGJAX_UPSTREAM_KEY")), bypass


def read_key(flag: str, file: str | None, variable: str | None = None) -> str | None:
    """A key from a file, or else from the environment."""
    if file is None:
        return os.environ.get(variable or "") or None
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file} cannot be read as ASCII text: {getattr(error, 'strerror', None) or error}") from error
    if not key or any(character.isspace() for character in key):
        raise ValueError(f"{flag} {file} must hold one word, the key")
    return key


def read_policy(file: str | None) -> str | None:
    if file is None:
        return None
    from pgjax.taxonomy import parse_taxonomy

    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        parse_taxonomy(text, file, brief=True)  # complains before a model is loaded
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--policy {file} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error


def readable(verdict: dict) -> str:
    """A verdict for people."""
    from pgjax.serving.verdict import printable

    lines = [f"--- {printable(str(verdict['id']), 80)}"] if "id" in verdict else []
    why = {"failure": " (no answer is in format: the guard fails closed)", "score": f" (score, from {verdict['threshold'] or 0:.3g})"}
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


def readable_rewrite(row: dict) -> str:
    """A rewrite for people. Both texts of it are a model's."""
    from pgjax.serving.verdict import REASONING_LIMIT, printable

    lines = [f"{part + ':':<9} {printable(said, REASONING_LIMIT)}" for part, said in (row["report"] or {}).items()]
    why = " (the answer cannot be taken as a rewrite: this is the original prompt)" if row["how"] == "fallback" else ""
    return "\n".join([*lines, f"prompt:   {printable(row['prompt'], len(row['prompt']))}", f"how:      {row['how']}{why}"])


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


def no_more(rest: list[str]) -> None:
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; see --help")


RUNS = (
    *(train, demo, moderate, evaluate, calibrate, serve, score, export, reward, bank, report),
    *(synthesize, sft, rewrite, evaluate_rewriter, demo_rewriter),
)
COMMANDS = {run.__name__.replace("_", "-"): run for run in RUNS}


def main(argv: list[str] | None = None) -> int:
    try:
        args, rest = parser().parse_known_args(argv)
        COMMANDS[args.command](args, rest)
    except ValueError as error:
        print(f"pgjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
