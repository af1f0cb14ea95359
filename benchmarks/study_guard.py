"""What the study asks of guards rather than of runs: the mean over several thoughts behind one prefill, and obedience to the policy."""

import time
from pathlib import Path

import numpy as np
from scipy.special import logit
from study_runs import Machine, short_group

from pgjax.config import Recipe
from pgjax.data.pipeline import Pipeline
from pgjax.data.schema import ABSENT, LABELS, UNSAFE
from pgjax.evaluation.calibration import Judged, fit
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
    """By number of thoughts: rows as study_runs.py has them; calibration error of the scores as they come, and under a map that was fitted
    on the other half of the groups (`pgjax calibrate`); seconds for all rows, and tokens that were written."""
    rows, found = shown(make_materials(recipe, run).held_out), {}
    with Guard.load(run) as guard:
        for samples in THOUGHTS:
            how = How(samples=samples, categories=False)
            judge(guard, rows[:1], how)  # compiles
            began = time.monotonic()
            done = judge(guard, rows, how)
            seconds = time.monotonic() - began
            score = np.array([v["scores"]["request"] for v in done.verdicts], float)  # NaN: no answer has the line
            unsafe = np.array([LABELS.index(e.request_label) for e, _ in done.shown])
            nowhere, absent = np.full(len(score), np.nan), np.full(len(score), ABSENT)  # no row has a response
            odds = logit(np.clip(score, 1e-15, 1 - 1e-15))
            told = [one for case in done.cases for one in case.future.result()]
            judged_rows = {
                "id": [e.id for e, _ in done.shown],
                "group": [short_group(e) for e, _ in done.shown],
                "unsafe": (unsafe == UNSAFE).astype(int).tolist(),
                "said": [{"safe": 0, "unsafe": 1}.get(v["request"]) for v in done.verdicts],
                "score": [None if np.isnan(x) else round(float(x), 4) for x in odds],
            }
            lines = Judged(*(np.stack([x, y], axis=1) for x, y in ((score, nowhere), (unsafe, absent))), np.array(judged_rows["group"]))
            fitted = fit(lines)[1]
            found[str(samples)] = {
                "after": judged_rows,
                "ece": fitted["before"]["ece"],
                "ece_calibrated": fitted["after"]["ece"],
                "seconds": seconds,
                "tokens": sum(len(one.tokens) for one in told),
            }
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
