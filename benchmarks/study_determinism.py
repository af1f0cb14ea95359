"""Experiment 6 of the study: does a run give the same numbers on other meshes, in two processes, and after it was killed? And how far are
the sampler's logprobs from those that the scoring program gives the same tokens?

`python benchmarks/study_determinism.py [--json]`. Every setting is the real trainer in processes of its own, and all go on from one
checkpoint: that of the first setting before its first step of GRPO. What a step sampled is kept beside its metrics, by prompt id.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np

from pgjax.config import MeshConfig, Recipe
from pgjax.recipes import from_json, load_recipe, to_json, validate


@dataclass(frozen=True)
class Setting:
    name: str
    mesh: MeshConfig = MeshConfig(1, 1, 1)
    processes: int = 1
    killed_in: int | None = None  # the step, from 0, in which SIGKILL comes: after sampling, before the update
    dtype: str = "float32"


BASE = Setting("1 device")
BFLOAT16 = Setting("1 device, bfloat16", dtype="bfloat16")
TWO_PROCESSES = Setting("2 processes of 1 device, data 2", MeshConfig(2, 1, 1), processes=2)
KILLED = Setting("1 device, killed and resumed", killed_in=13)
MESHES = (
    Setting("2 devices, data 2", MeshConfig(2, 1, 1)),
    Setting("8 devices, data 2 x fsdp 2 x tensor 2", MeshConfig(2, 2, 2)),
)


def study_recipe() -> Recipe:
    """The toy for a few steps, of two updates each: the policy's logprobs are then scored before the updates. The prompts of a
    mini-batch are the same on every mesh."""
    toy = load_recipe("toy")
    grpo = replace(toy.grpo, steps=24, mini_prompts=4, micro_prompts=4, shares=4, validate_every=0, checkpoint_every=4)
    return replace(toy, grpo=replace(grpo, keep_checkpoints=grpo.steps, keep_best=False), data=replace(toy.data, eval_examples=64))


def run(form: str, workdir: Path) -> dict:
    """The pilot simulates devices on the CPU. The accelerator form has the settings that one chip can show."""
    simulated = form == "pilot"
    return measure(study_recipe(), (*MESHES, TWO_PROCESSES, KILLED) if simulated else (KILLED,), workdir, simulated)


def measure(recipe: Recipe, others: Sequence[Setting], workdir: Path, simulated: bool = True) -> dict:
    """Runs the base setting in float32 and in bfloat16 and the other settings, in folders of `workdir`, and compares: see `row`."""
    found = {}
    for n, setting in enumerate((BASE, *others, BFLOAT16)):
        path = workdir / f"setting_{n}"
        shutil.rmtree(path, ignore_errors=True)
        for part in ("data", "tokenizer", "reference", "checkpoints/0") if n else ():  # no config, which would hold it to its dtype
            shutil.copytree(workdir / "setting_0" / part, path / part)
        carry_out(setting, recipe, path, simulated)
        found[setting.name] = Found.read(path, recipe)
    gaps = {"float32": found[BASE.name].gaps(), "bfloat16": found.pop(BFLOAT16.name).gaps()}
    means = {name: float(np.abs(values).mean()) for name, values in found[BASE.name].metrics.items()}
    text, grpo, minis = recipe.model.text, recipe.grpo, recipe.grpo.prompts // recipe.grpo.mini_prompts
    sizes = {"name": recipe.name, "width": text.width, "layers": text.layers, "vocab": text.vocab, "warm_up_steps": recipe.warm_up.steps}
    sizes |= {"steps": grpo.steps, "updates_per_step": minis, "prompts": grpo.prompts, "group": recipe.rollout.group}
    rows = [row(setting, found) for setting in (BASE, *others)]
    return {"settings": rows, "base_mean_size": means, "sampler_trainer": gaps, "recipe": sizes}


# --- one setting ---------------------------------------------------------------------------------------------------------------


def carry_out(setting: Setting, recipe: Recipe, path: Path, simulated: bool) -> None:
    """Trains in new processes, and again where the first were killed. RuntimeError with the end of what a failed one said."""
    devices = int(np.prod(astuple(setting.mesh))) if simulated else 0
    model = replace(recipe.model, compute_dtype=setting.dtype)
    recipe = validate(replace(recipe, model=model, mesh=setting.mesh, devices=devices))
    path.mkdir(parents=True, exist_ok=True)
    logs = [path / f"process_{index}.log" for index in range(setting.processes)]
    for killed_in in (None,) if setting.killed_in is None else (setting.killed_in, None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        job = dict(recipe=to_json(recipe), path=str(path), killed_in=killed_in, address=address, processes=setting.processes)
        children = []
        for index, log in enumerate(logs):
            with open(log, "w") as said:
                command = [sys.executable, __file__, "--child", json.dumps(job | {"index": index})]
                children.append(subprocess.Popen(command, stdout=said, stderr=said))
        codes = [process.wait() for process in children]
        if codes != [0 if killed_in is None else -signal.SIGKILL] * len(codes):
            raise RuntimeError(f"{setting.name}: exit {codes}\n" + "\n".join(log.read_text()[-2000:] for log in logs))


def child(recipe: str, path: str, killed_in: int | None, address: str, index: int, processes: int) -> None:
    """One process of a setting; jax is not imported before it is set up."""
    from pgjax.commands.start import start_jax

    made = from_json(recipe)
    start_jax(made.devices // processes)
    import jax

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, index)
        # Programs of several CPU processes that came from the cache were seen to reach their collectives in different orders.
        jax.config.update("jax_enable_compilation_cache", False)
    from pgjax.grpo import trainer

    grpo_step = trainer.grpo_step

    def recorded(programs, bank, recipe, state, reference, step, *rest):
        experience = programs.experience

        def seen(rollout, judged, batch, *args):
            made = experience(rollout, judged, batch, *args)
            keep(Path(path) / "rollouts" / f"{step}.npz", rollout, batch, made[0])
            if step == killed_in:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        with mock.patch.object(programs, "experience", seen):
            return grpo_step(programs, bank, recipe, state, reference, step, *rest)

    with mock.patch.object(trainer, "grpo_step", recorded):
        trainer.train(made, Path(path))


def keep(file: Path, rollout, batch, experience) -> None:
    """Answers of all processes with the sampler's logprobs, by prompt id; scored less sampled logprob of every token trained on."""
    import jax
    from jax.experimental.multihost_utils import process_allgather

    from pgjax.parallel.mesh import local_rows

    every = lambda x: process_allgather(local_rows(x), tiled=True)  # noqa: E731
    order_P = np.argsort(every(batch.id_P))
    by_prompt = {name: every(getattr(rollout, name))[order_P] for name in ("tokens_PGR", "length_PG", "logp_PGR")}
    gap_PQ, mask_PQ = every(experience.old_PQ) - every(experience.sampled_PQ), every(experience.mask_PQ)
    if jax.process_index() == 0:
        file.parent.mkdir(exist_ok=True)
        np.savez(file, **by_prompt, gap=gap_PQ[mask_PQ > 0])


# --- settings compared ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a setting left: its lines of metrics without times, numbers by step, what every step sampled."""

    lines: list[dict]
    metrics: dict[str, np.ndarray]
    rollouts: list[dict[str, np.ndarray]]

    @classmethod
    def read(cls, path: Path, recipe: Recipe) -> "Found":
        from pgjax.train.run_folder import read_metrics

        after = [line for line in read_metrics(path) if line["phase"] != "warm_up" and line["step"] > 0]
        lines = [{name: value for name, value in line.items() if not name.startswith(("perf/", "timing_s/"))} for line in after]
        of = lambda name: np.array([line[name] for line in lines if line["phase"] == "train"])  # noqa: E731
        by = recipe.grpo.loss
        loss = of("actor/pg_loss") + by.kl_coef * of("actor/kl_loss") - by.entropy_coef * of("actor/entropy")
        metrics = {"reward": of("critic/rewards/mean"), "loss": loss, "grad_norm": of("actor/grad_norm")}
        return cls(lines, metrics, [dict(np.load(path / "rollouts" / f"{step}.npz")) for step in range(recipe.grpo.steps)])

    def gaps(self) -> dict[str, float]:
        """Size of the difference between scored and sampled logprob, in nats, over all tokens of the run."""
        gap = np.abs(np.concatenate([rollout["gap"] for rollout in self.rollouts]))
        return {"mean": float(gap.mean()), "max": float(gap.max()), "tokens": len(gap)}


def row(setting: Setting, found: dict[str, Found]) -> dict:
    """A setting beside the base. Differences are the largest of all steps; of sampled logprobs, of the steps whose tokens are equal.
    `metrics_equal_to`: settings whose metrics of every step and of the last validation are bitwise these."""
    base, own = found[BASE.name], found[setting.name]
    steps = list(zip(base.rollouts, own.rollouts, strict=True))
    equal_PG = [(a["tokens_PGR"] == b["tokens_PGR"]).all(-1) & (a["length_PG"] == b["length_PG"]) for a, b in steps]
    same = [bool(equal.all()) for equal in equal_PG]
    logp = [np.abs(a["logp_PGR"] - b["logp_PGR"]).max() for (a, b), alike in zip(steps, same, strict=True) if alike]
    return {
        "setting": setting.name,
        "step_1_tokens_equal": same[0],
        "steps_tokens_equal": [*same, False].index(False),  # from the first on without a break
        "steps": len(same),
        "answers_equal": float(np.mean(equal_PG)),
        **{f"{name}_difference": float(np.abs(values - own.metrics[name]).max()) for name, values in base.metrics.items()},
        "logprob_difference": float(max(logp)) if logp else None,
        "metrics_bitwise_equal": own.lines == base.lines,
        "metrics_equal_to": [name for name, other in found.items() if name != setting.name and other.lines == own.lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=("pilot", "accelerator"), default="pilot")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(**json.loads(args.child))
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.form, Path(folder))
    if args.json:
        return print(json.dumps(found, indent=1))
    from timing import show

    show(found["settings"], False, f"Beside 1 device. {found['recipe']}; its mean size of {found['base_mean_size']}")
    show([{"compute": dtype} | gap for dtype, gap in found["sampler_trainer"].items()], False, "\nSampler against trainer, in nats")


if __name__ == "__main__":
    main()
