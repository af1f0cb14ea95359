"""What the study asks of guards rather than of runs: the mean over several thoughts behind one prefill, and obedience to the policy."""

import time
from pathlib import Path

import numpy as np
from scipy.special import logit
from study_runs import Machine

from pgjax.config import Recipe
from pgjax.data.pipeline import Pipeline
from pgjax.evaluation.calibration import calibration_error
from pgjax.evaluation.obedience import obedience
from pgjax.evaluation.passes import Pass, Shown, judged
from pgjax.serving.guard import Guard, How
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.materials import make_materials
from pgjax.train.run_folder import RunFolder
from pgjax.train.update import make_optimizer

THOUGHTS = (1, 8)  # answers a prompt: the likeliest one, or so many drawn


def shown(held_out: Pipeline) -> list[Shown]:
    """Held-out rows, each with the policy that its prompt shows."""
    return [row for k in range(held_out.batches(64)) for row in held_out.batch(k, 64).rows]


def judge(guard: Guard, rows: list[Shown], how: How) -> Pass:
    return judged(guard, guard.policy(), rows, how, lambda: None)


def averaged(recipe: Recipe, run: Path) -> dict:
    """By number of thoughts: rows as study_runs.py has them, calibration error, seconds for all rows, and tokens that were written."""
    rows, found = shown(make_materials(recipe, run).held_out), {}
    with Guard.load(run) as guard:
        for samples in THOUGHTS:
            how = How(samples=samples, categories=False)
            judge(guard, rows[:1], how)  # compiles
            began = time.monotonic()
            done = judge(guard, rows, how)
            seconds = time.monotonic() - began
            score = np.array([v["scores"]["request"] for v in done.verdicts], float)  # NaN: no answer has the line
            unsafe = np.array([e.request_label == "unsafe" for e, _ in done.shown])
            odds = logit(np.clip(score, 1e-15, 1 - 1e-15))
            told = [one for case in done.cases for one in case.future.result()]
            judged_rows = {
                "id": [e.id for e, _ in done.shown],
                "group": [e.group.removeprefix("text-")[:8] for e, _ in done.shown],
                "unsafe": unsafe.astype(int).tolist(),
                "said": [{"safe": 0, "unsafe": 1}.get(v["request"]) for v in done.verdicts],
                "score": [None if np.isnan(x) else round(float(x), 4) for x in odds],
            }
            error = float(calibration_error(score[~np.isnan(score)], unsafe[~np.isnan(score)]))
            tokens = sum(len(one.tokens) for one in told)
            found[str(samples)] = {"after": judged_rows, "ece": error, "seconds": seconds, "tokens": tokens}
    return {"thoughts": found}


def obeyed(recipe: Recipe, run: Path, folder: Path) -> dict:
    """Obedience to the policy of the base model, whose run is made in `folder`, and of a trained run."""
    rows, found = shown(make_materials(recipe, run).held_out), {}
    for name, path in (("before", base_run(recipe, folder)), ("after", run)):
        with Guard.load(path) as guard:
            found[name] = obedience(guard, judge(guard, rows, How(categories=False)), How(), recipe.seed, lambda: None)
    return found


def base_run(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint that a recipe starts from, as the folder of a run that has taken no step."""
    machine = Machine.of(recipe, folder)
    RunFolder(folder, recipe).close()
    reference = machine.setup.reference(machine.params)
    state = machine.setup.state(machine.params, make_optimizer(recipe.grpo.optimizer, 1))
    for name, tree in (("reference", reference), ("checkpoints", state)):
        checkpoints = Checkpoints(folder / name, 1)
        checkpoints.save(0, tree)
        checkpoints.close()
    return folder
