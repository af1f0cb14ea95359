"""Subcommands that run a guard; `serve` runs a rewriter's gateway too."""

import argparse
import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pgjax.commands.start import no_more, read_key, read_policy, start_jax


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
    from pgjax.serving.verdict import readable
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


def evaluate(args: argparse.Namespace, rest: list[str]) -> None:
    no_more(rest)
    start_jax(0)
    from pgjax.evaluation.command import run

    summary, text = run(Path(args.model), args, judging(args), loading(args))
    print(json.dumps(summary) if args.json else text, end="\n" if args.json else "")


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
    target, bypass = gateway_of(args, key)
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


def gateway_of(args: argparse.Namespace, key: str | None) -> tuple[Any, str | None]:
    """The server behind the gateway, and the key for passing it by; `key` is that of clients."""
    if not args.rewriter:
        if not args.model:
            raise ValueError("serve needs --model, a guard's folder, or --rewriter and --upstream")
        if args.upstream or args.upstream_key_file or args.bypass_key_file or args.allow_remote:
            raise ValueError("--upstream, --upstream-key-file, --bypass-key-file and --allow-remote are for a gateway; give --rewriter too")
        return None, None
    if not args.upstream:
        raise ValueError("--rewriter needs --upstream, the URL of the server that answers the rewritten requests")
    idle = {"policy": None, "categories": [], "threshold": None, "samples": 1, "mode": "think", "unbound": False, "name": None}
    if given := [name for name, default in idle.items() if not args.model and getattr(args, name) != default]:
        raise ValueError(f"--{given[0]} is for a guard, and --rewriter alone has none; give --model too, or leave it out")
    from pgjax.rewriter.upstream import Upstream, checked_url

    url, bypass = checked_url(args.upstream, args.allow_remote), read_key("--bypass-key-file", args.bypass_key_file)
    own = read_key("--upstream-key-file", args.upstream_key_file, "PGJAX_UPSTREAM_KEY")
    keys = [one for one in (key, bypass, own) if one]
    if len(set(keys)) < len(keys):
        raise ValueError("--api-key-file, --bypass-key-file and --upstream-key-file must hold different keys")
    return Upstream(url, own), bypass


def judging(args: argparse.Namespace) -> Any:
    """How a command is to judge."""
    from pgjax.serving.guard import How

    return How(args.mode, args.samples, args.threshold, args.fail_open)


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Guard.load of a command that judges."""
    return {"best": args.best, "rows": args.rows, "bound": not args.unbound, "prompt_tokens": args.prompt_tokens}
