"""The study behind docs/results.md: experiments by name, one JSON file for each run, tables and plots from the files alone.

    python benchmarks/study.py data   --root DIR                 the data sets, from the public sets below DIR (default $PGJAX_DATA)
    python benchmarks/study.py run learning [...] [--form pilot|accelerator] [--seeds 0 1 2] [--only WORD]
    python benchmarks/study.py report                            docs/results.md and its plots

Needs the extras `bench` and `docs`, and runs/smollm2 (examples/smollm2). A run that has its file is not made again, and one that was
killed goes on from its checkpoint: a study is resumed by giving the command again. `pilot` takes minutes to hours on two CPU cores;
`accelerator` is for one card.

Experiments: learning (1: GRPO alone beside its baselines), naming (2), thinking (3), data (4), clock (5), determinism (6).
"""

import argparse
import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import study_adversary
import study_data

from pgjax.commands.start import start_jax
from pgjax.config import Recipe
from pgjax.files import remove_folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
WORK = Path("runs/study")
HELD_OUT = {"pilot": 160, "accelerator": None}  # rows at most
FORMS = {
    "accelerator": [],
    "pilot": [
        *("--model.compute-dtype", "float32", "--data.prompt-tokens", "192", "--grpo.steps", "30"),
        *("--grpo.prompts", "4", "--grpo.mini-prompts", "4", "--grpo.micro-prompts", "4", "--grpo.validate-prompts", "16"),
        *("--grpo.validate-every", "30", "--devices", "2", "--mesh.data", "2", "--mesh.fsdp", "1"),  # two keep two cores busier
    ],
}
EXPERIMENTS = ("learning", "naming", "thinking", "data", "clock", "determinism")
THOUGHT_STEPS = 0.47  # of the steps: with 96 tokens an answer instead of 32 they take as many tokens


class Setting(NamedTuple):
    """A run by GRPO: its data set, overrides of configs/study.py, and the part of the form's steps that it takes."""

    data: str = "texts"
    overrides: tuple[str, ...] = ()
    steps: float = 1.0


def settings(experiment: str, form: str) -> dict[str, Setting]:
    """What the runs by GRPO vary. "learning/grpo" is what "thinking" and "data" are compared with, and is not made twice."""
    if experiment in ("clock", "determinism"):
        return {}
    if experiment == "learning":
        return {"grpo": Setting()}
    if experiment == "thinking":
        return {"think": Setting(overrides=("--answer.max-tokens", "96"), steps=THOUGHT_STEPS)}
    if experiment == "data":
        shown = {
            "nothing_hidden": Setting(overrides=("--data.ood.share", "0")),
            "in_order": Setting(overrides=("--data.ood.shuffle", "False")),
        }
        return shown | {name: Setting(name) for name in ("only_openai_moderation", "only_surge_toxicity")}

    def naming(bank: str, share: str) -> Setting:
        file = WORK / "data" / form / f"bank_{bank}.npz"
        never_seen = ("--data.ood.never-seen", *study_data.NEVER_SEEN)
        return Setting("naming", (*never_seen, "--data.ood.share", share, "--reward.bank", str(file)))

    return {bank: naming(bank, "0.6") for bank in study_adversary.VARIANTS} | {"no_ood_task": naming("full", "0")}


class Run(NamedTuple):
    experiment: str
    name: str
    seed: int
    make: Callable[[], dict]

    def file(self, form: str) -> Path:
        return RESULTS / form / self.experiment / f"{self.name}-{self.seed}.json"


def recipe(form: str, checkpoint: str, seed: int, setting: Setting, name: str) -> Recipe:
    from pgjax.models.hf_config import with_checkpoint
    from pgjax.recipes import load_recipe, override, validate

    base = dataclasses.replace(load_recipe(ROOT / "configs" / "study.py"), checkpoint=checkpoint, seed=seed, name=name)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, root=str(WORK / "data" / form / setting.data)))
    made = override(with_checkpoint(base), [*FORMS[form], *setting.overrides])
    steps = round(made.grpo.steps * setting.steps)
    return validate(dataclasses.replace(made, grpo=dataclasses.replace(made.grpo, steps=steps)))


def runs(experiment: str, form: str, checkpoint: str, seed: int) -> Iterator[Run]:
    """An experiment's runs of one seed, in the order in which later ones need earlier ones; what no seed changes is of seed 0."""
    import study_clock
    import study_determinism
    import study_guard
    import study_runs as made

    folder = lambda name: WORK / form / experiment / f"{name}-{seed}"  # noqa: E731
    for name, setting in settings(experiment, form).items():
        one = recipe(form, checkpoint, seed, setting, f"{name}-{seed}")
        yield Run(experiment, name, seed, partial(made.by_grpo, one, folder(name), keep=experiment in ("learning", "thinking")))
    others: dict[str, Callable[[], dict]] = {}
    if experiment == "learning":
        base, at = recipe(form, checkpoint, seed, Setting(), f"baselines-{seed}"), folder("baselines")

        def grpo() -> dict:
            """What it cost."""
            file = Run(experiment, "grpo", seed, dict).file(form)
            if not file.exists():
                raise ValueError(f"{file} is not there: supervised runs spend what GRPO spent; run learning without --only first")
            return json.loads(file.read_text())["cost"]

        others["sft_rows"] = lambda: made.by_sft(base, at, rows=grpo()["rows"])
        others["sft_flops"] = lambda: made.by_sft(base, at, flops=grpo()["flops"])
        if seed == 0:
            others |= {"probe": partial(made.by_probe, base, at), "words": partial(made.by_words, base, at)}
            others |= {f"majority{of}": partial(made.by_majority, base, at, bool(of)) for of in ("", "_of_source")}
    if experiment == "thinking":
        others["averaged"] = lambda: study_guard.averaged(one, folder("think"))
    if experiment == "data":
        trained = recipe(form, checkpoint, seed, Setting(), f"grpo-{seed}"), WORK / form / "learning" / f"grpo-{seed}"
        others["obedience"] = lambda: study_guard.obeyed(*trained, fresh(folder("base")))
    if experiment == "naming" and seed == 0:
        others["adversary"] = lambda: study_adversary.run(form, fresh(folder("adversary")))
    if experiment == "clock" and form == "pilot":  # TRL without vLLM says nothing about accelerators
        others["toy"] = lambda: study_clock.run(form, seed, fresh(folder("toy")))
    if experiment == "determinism" and seed == 0:
        others["toy"] = lambda: study_determinism.run(form, fresh(folder("toy")))
    for name, make in others.items():
        yield Run(experiment, name, seed, make)


def fresh(folder: Path) -> Path:
    """An empty folder, for what does not go on where it was."""
    remove_folder(folder)
    folder.mkdir(parents=True)
    return folder


def commit() -> str:
    """Of the code that runs; nothing where it lies in no repository."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def write(run: Run, form: str) -> None:
    """Make the run's file, unless it is there."""
    from timing import machine

    file = run.file(form)
    if file.exists():
        return
    print(f"{form}: {run.experiment}: {run.name}, seed {run.seed}", file=sys.stderr, flush=True)
    began = time.monotonic()
    found = run.make()
    about = {"experiment": run.experiment, "run": run.name, "seed": run.seed, "form": form, "commit": commit()}
    about |= {"date": str(datetime.date.today()), "machine": machine(), "seconds": round(time.monotonic() - began, 1)}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(about | found, separators=(",", ":")) + "\n")
    aside.rename(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    data = actions.add_parser("data")
    data.add_argument("--root")
    run = actions.add_parser("run")
    run.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    run.add_argument("--form", choices=FORMS, default="pilot")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--only", help="runs of this name alone")
    run.add_argument("--checkpoint", default="runs/smollm2")
    actions.add_parser("report")
    args = parser.parse_args()
    if args.action == "data":
        for form in FORMS:
            study_data.build(WORK / "data" / form, args.root, HELD_OUT[form])
    elif args.action == "run":
        start_jax(2 if args.form == "pilot" else 0)
        for experiment in args.experiments:
            for seed in args.seeds:
                for one in runs(experiment, args.form, args.checkpoint, seed):
                    if args.only in (None, one.name):
                        write(one, args.form)
    else:
        from study_report import report

        report(RESULTS, ROOT / "docs")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"study: {error}")
