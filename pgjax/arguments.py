"""What the `pgjax` command takes: subcommands and their flags."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Wrong usage is an error like any other: one line, no page of usage above it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The parsed namespace has the subcommand's name as `command`; unknown arguments are the command's to refuse or to take."""
    main = Parser(prog="pgjax", description="A proactive vision-language safety guard, trained by GRPO in JAX.")
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)  # --f is not --fresh, which deletes
        sub.set_defaults(command=name)
        return sub

    for name, text in (
        ("train", "train a recipe by GRPO; goes on from the last checkpoint; --KEY VALUE overrides any recipe value"),
        (
            "sft",
            "train a rewriter on what `pgjax synthesize` made; goes on from the last checkpoint; --KEY VALUE overrides any recipe value",
        ),
        ("demo", "train the toy recipe, evaluate before and after, and moderate three inputs"),
    ):
        sub = command(name, text)
        sub.add_argument("config", nargs="?" if name == "demo" else None, default="toy", help="a name in configs/ or a path")
        sub.add_argument("--runs", default="runs", help="folder of run folders")
        if name != "demo":
            again = sub.add_mutually_exclusive_group()
            again.add_argument("--fresh", action="store_true", help="drop an earlier run of this name")
            again.add_argument(
                "--from", type=int, metavar="STEP", dest="go_back", help="go on from this checkpoint and drop the later ones"
            )
            sub.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 of several listens; default: found by itself")
            sub.add_argument("--processes", type=int, metavar="N", help="how many there are; on SLURM, Cloud TPU and GKE found by itself")
            sub.add_argument("--process", type=int, metavar="K", help="which of them this is, from 0")
        if name == "train":
            sub.add_argument("--profile", action="store_true", help="write a trace of one step into the run's folder profile/")

    sub = command("plan", "compile a recipe for hardware that is not here: what fits, what moves, a step's floor; --KEY VALUE overrides")
    sub.add_argument("config", help="a name in configs/ or a path")
    sub.add_argument("--topology", required=True, help="v5e:8x8, 2*v5p:4x4x4 (two slices), h100:8x8 (8 nodes of 8)")
    sub.add_argument("--json", action="store_true", help="the plan as JSON")
    sub = command("demo-rewriter", "a toy rewriter from data to gateway, with programs as analyst, target and judge")
    sub.add_argument("--runs", default="runs", help="folder of run folders")
    sub = command("synthesize", "make the rewriter's training data, in three stages with quality control; --KEY VALUE overrides any value")
    sub.add_argument("config", help="a name in configs/ or a path")
    sub.add_argument("--allow-remote", action="store_true", help="let requests and pictures leave this machine")

    def opening(
        name: str, text: str, needed: bool = True, best: str = "checkpoint with the highest held-out request F1"
    ) -> argparse.ArgumentParser:
        """A command that runs a model."""
        sub = command(name, text)
        sub.add_argument("--model", required=needed, help="run folder, or Hugging Face checkpoint directory")
        sub.add_argument("--best", action="store_true", help=f"a run's {best}; default the newest")
        sub.add_argument("--rows", type=int, default=8, help="answers that are decoded at a time, on each device that shares the batch")
        sub.add_argument("--prompt-tokens", type=int, help="longest prompt, instead of the one that the model was trained with")
        return sub

    def guarding(name: str, text: str, needed: bool = True) -> argparse.ArgumentParser:
        """A command that runs a guard."""
        sub = opening(name, text, needed)
        sub.add_argument("--unbound", action="store_true", help="answers are not held to the format, to measure what that changes")
        sub.add_argument("--mode", choices=("think", "fast"), default="think", help="fast: without reasoning")
        sub.add_argument("--samples", type=int, default=1, help="answers to a conversation, drawn, that vote; 1: one greedy answer")
        return sub

    def listing(sub: argparse.ArgumentParser) -> None:
        """One policy for all rows."""
        sub.add_argument("--policy", help="categories of your own: YAML or JSON, a list of categories or of names")
        sub.add_argument("--categories", nargs="*", default=[], help="ids that the prompt's policy lists; default all")

    def thresholding(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--threshold", type=float, help="of the unsafe score; default the calibrated one, without one the labels decide")

    def deciding(sub: argparse.ArgumentParser) -> None:
        """What is flagged."""
        thresholding(sub)
        sub.add_argument("--fail-open", action="store_true", help="an answer that does not parse passes; default: it is flagged")

    sub = guarding("moderate", "verdicts on conversations: one from the flags, or those of a file")
    for flag, text in (("request", "user text"), ("response", "agent text"), ("image", "file")):
        sub.add_argument(f"--{flag}", help=text)
    sub.add_argument("--jsonl", help="conversations, one JSON object a line: request, response, image (a path beside the file), id")
    sub.add_argument("--out", help="folder for the verdicts of --jsonl and for its errors; goes on where it was killed")
    listing(sub)
    deciding(sub)
    sub.add_argument("--json", action="store_true", help="one JSON object a conversation")
    sub = guarding("evaluate", "the tables of the paper for any checkpoint, on public benchmarks")
    sub.add_argument("--benchmark", nargs="+", required=True, help="names, or held_out: the held-out rows of a run folder")
    sub.add_argument("--data", help="folder of the sets; default $PGJAX_DATA")
    sub.add_argument("--out", required=True, help="folder for evaluation.json, tables.md, report.html and answers.jsonl")
    sub.add_argument("--limit", type=int, help="at most so many rows of a set, whole groups by a hash of their name; default all")
    sub.add_argument("--held-out", action="store_true", help="of sets that training may have used, the held-out rows alone")
    sub.add_argument("--allow-overlap", action="store_true", help="evaluate rows that the model was trained on; default: they are refused")
    thresholding(sub)
    sub.set_defaults(fail_open=False)  # an answer that does not parse is wrong, whatever a guard would make of it
    sub.add_argument("--obedience", action="store_true", help="also ask whether answers follow a changed policy")
    sub.add_argument("--reveal", action="store_true", help="texts unfolded and pictures sharp in the report; default folded and blurred")
    sub.add_argument("--seed", type=int, default=0, help="of what is hidden and of the intervals")
    sub.add_argument("--json", action="store_true", help="the summary as one JSON object")
    sub = guarding("calibrate", "make a guard's scores probabilities and choose its threshold, on labelled conversations")
    sub.add_argument("--jsonl", required=True, help="conversations with request_label and response_label: rows as for training")
    listing(sub)
    sub.add_argument("--max-fpr", type=float, help="the lowest threshold that flags at most this share of safe ones; default: largest F1")
    sub.add_argument("--report", help="where the page goes; default calibration.html beside the model")
    sub = guarding("serve", "the guard, or a rewriter before another server, behind HTTP in OpenAI's shapes; docs/serving.md", False)
    sub.add_argument("--rewriter", help="folder of a rewriter: be a gateway to --upstream, with --model as its guard where that is given")
    sub.add_argument("--upstream", metavar="URL", help="OpenAI-compatible server that the gateway sends to, http(s)://HOST/v1")
    sub.add_argument("--upstream-key-file", help="file with the key for it; default the variable PGJAX_UPSTREAM_KEY, else none")
    sub.add_argument("--bypass-key-file", help="file with a key that lets requests pass as they are (header X-Pgjax-Bypass); default none")
    sub.add_argument("--allow-remote", action="store_true", help="--upstream may be another machine: requests leave this one")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs a key")
    sub.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    sub.add_argument("--name", help="of the model, for clients; default the folder's")
    sub.add_argument("--queue", type=int, default=64, help="requests that may wait; more are told to come again (429)")
    listing(sub)
    deciding(sub)
    sub.add_argument("--api-key-file", help="file with the key that clients must send; default the variable PGJAX_API_KEY, else none")
    sub.add_argument("--no-key", action="store_true", help="let other machines in without a key")
    sub.add_argument("--allow-image-host", nargs="*", default=[], metavar="HOST", help="https hosts whose images are fetched; default none")
    sub.add_argument("--timeout", type=float, default=60.0, help="seconds from a request to its answer; it may ask for less")
    sub.add_argument("--drain", type=float, default=60.0, help="seconds that requests under way get when the server is stopped")
    sub.add_argument("--max-body", type=int, default=20, metavar="MIB", help="of a request")
    sub.add_argument("--max-bodies", type=int, default=256, metavar="MIB", help="of all requests under way together")
    sub.add_argument("--max-images", type=int, default=4, help="of a conversation; /v1/moderations takes one")
    sub.add_argument("--max-megapixels", type=int, default=16, help="of an image, as it is sent")
    sub.add_argument("--max-text", type=int, default=100_000, metavar="CHARACTERS", help="of a conversation")
    sub.add_argument("--max-policy", type=int, default=20_000, metavar="CHARACTERS", help="of a request's own policy")
    sub.add_argument("--max-inputs", type=int, default=32, help="texts of one call of /v1/moderations; at most --queue")
    text = "a rewriter's risk report and prompt: for one request from the flags, or for those of a file"
    sub = opening("rewrite", text, best="best checkpoint")
    sub.add_argument("--request", help="user text")
    sub.add_argument("--image", help="file")
    sub.add_argument("--jsonl", help="requests, one JSON object a line: id, request, image (a path beside the file)")
    sub.add_argument("--json", action="store_true", help="one JSON object a request")
    sub = command("evaluate-rewriter", "targets with and without a rewriter and other defences, graded by a judge, on public benchmarks")
    sub.add_argument("--rewriter", help="run folder of `pgjax sft`, or checkpoint directory; without it the other defences are measured")
    sub.add_argument(
        "--benchmark", nargs="+", required=True, help="names of sets, NAME:PART such as vlguard:test, or files of rows, *.jsonl"
    )
    spec = "MODEL@URL, MODEL@URL#VARIABLE with the environment variable of the key, or a folder with a model"
    sub.add_argument("--target", nargs="+", required=True, metavar="SPEC", help=spec)
    sub.add_argument("--judge", required=True, metavar="SPEC", help="the model that grades, the same way")
    defences = ("none", "defensive", "ecso", "rewriter")
    sub.add_argument("--defence", nargs="+", choices=defences, default=(), help="default all, rewriter where there is one")
    sub.add_argument("--data", help="folder of the sets; default $PGJAX_DATA")
    sub.add_argument("--limit", type=int, help="at most so many rows of a set, whole groups by a hash of their name; default all")
    sub.add_argument(
        "--out", required=True, help="folder for evaluation.json, tables.md, report.html, answers.jsonl; goes on where it was killed"
    )
    sub.add_argument("--allow-remote", action="store_true", help="content may be sent to other machines")
    sub.add_argument("--concurrency", type=int, default=8, help="calls of an endpoint at a time")
    sub.add_argument("--per-minute", type=int, default=0, help="calls of an endpoint; 0: no limit")
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds of a call")
    sub.add_argument("--seed", type=int, default=0, help="of the intervals")
    sub.add_argument("--reveal", action="store_true", help="texts unfolded and pictures sharp in the report; default folded and blurred")
    sub.add_argument("--json", action="store_true", help="the summary as one JSON object")
    sub = command("score", "log-probabilities of given completions, token by token")
    sub.add_argument("--model", required=True, help="Hugging Face checkpoint directory, or run folder")
    sub.add_argument("--jsonl", required=True, help="rows {messages, completion, id}; an image part is a path beside the file")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    sub.add_argument("--max-pixels", type=int, help="cap on a picture's area, beside a checkpoint directory; a run has its own")
    sub.add_argument("--json", action="store_true", help="one JSON object a row, with tokens and logprobs")
    sub = command("export", "write a run as a Hugging Face checkpoint directory")
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument("folder", metavar="DIR", help="the directory to make")
    sub.add_argument("--best", action="store_true", help="the checkpoint with the highest held-out request F1; default the newest")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the files; default the recipe's compute type")
    sub = command("reward", "the reward of given answers, term by term")
    sub.add_argument("--jsonl", required=True, help="answers with their gold labels, one JSON object a line")
    sub.add_argument("--variant", choices=("published", "strict"), default="strict", help="the released rules, or ours (default)")
    sub.add_argument("--json", action="store_true", help="one JSON object")
    sub.add_argument("--think-tag", choices=("think", "thinking"), default="think", help="the tag that answers reason in")
    sub.add_argument("--taxonomy", help="YAML file; default the packaged one")
    sub.add_argument("--embedder", help="sentence-transformers folder; default the MiniLM package")
    sub.add_argument("--bank", help="file made by `pgjax bank`: its thresholds, and its rows for names without synonyms")
    sub = command("bank", "build a synonym bank, or set its thresholds from its own similarities")
    sub.add_argument("action", choices=("build", "calibrate"))
    sub.add_argument("--bank", default="bank.npz", help="the file to write (and, to calibrate, to read)")
    sub.add_argument("--taxonomy", help="YAML file; default the packaged one")
    sub.add_argument("--embedder", help="sentence-transformers folder; default the MiniLM package")
    sub.add_argument("--exclude", nargs="*", default=[], help="ids without a bank row")
    actions = command("data", "datasets: build one from public sets and rows of your own, look at it")
    actions = actions.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, allow_abbrev=False)

    sub = action("build", "read, clean, label by vote, balance, write; --KEY VALUE overrides any value")
    sub.add_argument("config", help="a path, such as configs/data/public.py")
    sub.add_argument("--allow-remote", action="store_true", help="rows may be sent to judges on other machines")
    sub = action("stats", "counts by modality, label, category and source; lengths and sizes of pictures")
    sub.add_argument("folder", metavar="DIR", help="a built dataset; a run folder's is its data/")
    sub.add_argument("--model", metavar="DIR", help="lengths in tokens of its prompts: run folder, or Hugging Face checkpoint directory")
    sub.add_argument("--json", action="store_true", help="one JSON object")
    sub = action("show", "one row: the prompt as a model is shown it, its picture, its gold")
    sub.add_argument("folder", metavar="DIR", help="a built dataset; a run folder's is its data/")
    sub.add_argument("--id", required=True, help="of the row")
    sub.add_argument("--model", metavar="DIR", help="whose prompt: run folder, or Hugging Face checkpoint directory")
    sub.add_argument("--out", default="row.html", help="the page")
    sub.add_argument("--reveal", action="store_true", help="the prompt on the terminal, picture sharp; default folded and blurred")
    sub = command("report", "write report.html of a run folder anew")
    sub.add_argument("folder", metavar="RUN", help="run folder")
    return main
