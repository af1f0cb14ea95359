"""The study's training runs and what they are compared with: each a function that returns what its JSON file holds (study.py).

A run by GRPO is `pgjax train` with a recipe of its own: it stops and goes on as one. The others judge the rows that its pipelines keep.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import logit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pgjax.config import Recipe
from pgjax.conversation import answer_text
from pgjax.data.pipeline import Batch, Pipeline
from pgjax.data.schema import CATEGORY_OOD, Example
from pgjax.evaluation.evaluate import answer
from pgjax.evaluation.samples import sample_rows
from pgjax.files import remove_folder
from pgjax.generate.law import Law
from pgjax.generate.score import answer_rows
from pgjax.grpo.programs import Judge, Programs
from pgjax.grpo.trainer import train
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.sft.step import make_step, taught
from pgjax.taxonomy import PolicyView
from pgjax.tokenizer import never_sampled
from pgjax.train.flops import matmul_weights, supervised_flops
from pgjax.train.materials import Materials, make_materials
from pgjax.train.run_folder import read_metrics
from pgjax.train.setup import make_setup
from pgjax.train.trainable import merge
from pgjax.train.update import make_optimizer

CURVES = ("request_f1", "request_auroc", "category_accuracy", "ood_f1", "naming", "naming_second", "naming_top1", "parse_failures")
MEASURES = ("naming", "naming_second", "naming_mrr", "naming_top1")


# --- rows --------------------------------------------------------------------------------------------------------------------------


def judged_rows(samples: list[dict], groups: dict[str, str]) -> dict[str, list]:
    """Held-out rows in columns, from a samples file: what they are and what was said of each. `score` is the log-odds of unsafe, since
    probabilities of a trained policy are too near 0 and 1 to be told apart in few digits. The measures of naming are of `named_rows`
    alone, the numbers of the rows that lack their category."""
    short = lambda value: None if value is None else round(value, 4)  # noqa: E731
    odds = lambda p: None if p is None else short(float(logit(np.clip(p, 1e-15, 1 - 1e-15))))  # noqa: E731
    named = [k for k, s in enumerate(samples) if s["category"] == "ood"]
    return {
        "id": [s["id"] for s in samples],
        "group": [groups[s["id"]] for s in samples],
        "unsafe": [int(s["request_label"] == "unsafe") for s in samples],
        "said": [s["verdict"]["request"] if s["verdict"]["parsed"] else None for s in samples],  # code: 0 safe, 1 unsafe
        "score": [odds(s["score_request"]) for s in samples],
        "category": [("never_seen" if s["never_seen"] else s["category"]) for s in samples],
        "category_right": [int(s["terms"]["category_right"]) for s in samples],
        "ood_detected": [int(s["terms"]["ood_detected"]) for s in samples],
        "named_rows": named,
    } | {measure: [short(samples[k][measure]) for k in named] for measure in MEASURES if measure in samples[0]}


def short_group(example: Example) -> str:
    """The first digits of a text's hash say as much as all of them."""
    return example.group[5:13] if example.group.startswith("text-") else example.group


def group_names(pipeline: Pipeline) -> dict[str, str]:
    return {e.id: short_group(e) for e in (pipeline._examples[k] for k in pipeline.kept)}


# --- GRPO --------------------------------------------------------------------------------------------------------------------------


def by_grpo(recipe: Recipe, run: Path, keep: bool) -> dict:
    """Train, or go on; gives `grpo_results`. What `keep` is about are checkpoints, gigabytes each."""
    train(recipe, run)
    found = grpo_results(recipe, run, group_names(make_materials(recipe, run).held_out))
    if not keep:
        remove_folder(run / "checkpoints"), remove_folder(run / "reference")
    return found


def grpo_results(recipe: Recipe, run: Path, groups: dict[str, str]) -> dict:
    """From a run's folder: costs, curves of what was held out and of what was trained on, and the held-out rows before and after."""
    metrics = read_metrics(run)
    steps = [row for row in metrics if row["phase"] == "train"]
    cost = lambda row: {  # noqa: E731
        "seconds": row["perf/time_per_step"],
        "tokens": (row["perf/tokens_per_s/update"] * row["timing_s/update"]),
        "flops": sum(value for name, value in row.items() if name.startswith("perf/flops/")),
    }
    costs = [cost(row) for row in steps]
    total = lambda name, step: sum(one[name] for one in costs[:step])  # noqa: E731
    curve = [
        {"step": row["step"]} | {name: row.get(name) for name in CURVES} | {name: total(name, row["step"]) for name in costs[0]}
        for row in metrics
        if row["phase"] == "eval"
    ]
    trained = {
        name: [row[key] for row in steps]
        for name, key in (
            ("reward", "critic/rewards/mean"),
            ("length", "response_length/mean"),
            ("category", "reward/category_right"),
            ("ood", "reward/ood_detected"),
            ("bonus", "reward/bonus"),
            ("informative", "rollout/informative"),
        )
    }
    read = lambda step: judged_rows(list(map(json.loads, (run / "samples" / f"{step}.jsonl").read_text().splitlines())), groups)  # noqa: E731
    seconds = [one["seconds"] for one in costs]
    return {
        "cost": {name: total(name, None) for name in costs[0]}
        | {"step_seconds": float(np.median(seconds)), "rows": len(steps) * recipe.grpo.prompts},
        "curve": curve,
        "trained": trained,
        "before": {name: column for name, column in read(0).items() if name in ("said", "score", "category_right", *MEASURES)},
        "after": read(recipe.grpo.steps),
    }


# --- what it is compared with --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """The base model with its programs and data, without a run."""

    recipe: Recipe
    materials: Materials
    programs: Programs
    setup: object
    params: dict

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> "Machine":
        folder.mkdir(parents=True, exist_ok=True)
        materials, setup = make_materials(recipe, folder), make_setup(recipe.model, make_mesh(recipe.mesh))
        judge = Judge(materials.embedder, materials.bank)
        programs = Programs(recipe, setup, optax.identity(), materials.automaton, materials.tokenizer, judge)
        return cls(recipe, materials, programs, setup, setup.load(recipe.checkpoint))

    def judge(self, params: dict) -> dict[str, list]:
        """The held-out split's rows by the model with these parameters."""
        held_out, weights = self.materials.held_out, self.programs.gather(params)
        answered = answer(self.programs, weights, held_out, self.materials.full_bank, self.recipe.grpo.validate_prompts)
        samples = [row for one in answered for row in sample_rows(one, self.materials.taxonomy, False)]
        return judged_rows(samples, group_names(held_out))


def right_answer(example: Example, view: PolicyView, kind: int, materials: Materials) -> str:
    """What the gold asks for, with an empty thought: a shown id; a name where the policy lacks the risk or it is not known."""
    category = None
    if example.request_label == "unsafe":
        node = None if example.node is None else materials.taxonomy.index(example.node)
        shown = next((id for id, n in view.entries if n == node), None)
        category = shown or (materials.taxonomy.nodes[node].name if kind == CATEGORY_OOD and node is not None else "unsafe content")
    return answer_text(example.request_label, "safe", category, "", example.modality, "think")


def lessons(batch: Batch, materials: Materials, limit: int):
    """Prompts with their right answers. An unknown category carries no loss: what stands after `Category:` has no weight there."""
    encode = partial(materials.tokenizer, add_special_tokens=False)
    stop = materials.tokenizer.eos_token_id
    tokens_PG, weights = [], []
    for (example, view), kind in zip(batch.rows, batch.gold.category_P, strict=True):
        text = right_answer(example, view, kind, materials)
        ids = [*encode(text)["input_ids"], stop]
        known = example.category != "unknown"
        learnt = len(ids) if known else len(encode(text[: text.index("Category:") + len("Category:")])["input_ids"])
        tokens_PG.append([ids])
        weights.append(np.arange(limit) < learnt)
    tokens_PGR, length_PG = answer_rows(tokens_PG, limit)
    return taught(batch.prompt, tokens_PGR, length_PG, np.array(weights, np.float32)[:, None])


def by_sft(recipe: Recipe, folder: Path, rows: int = 0, flops: float = 0.0) -> dict:
    """Supervised by the right answers, on so many rows, or for so many FLOPs; prompts in GRPO's order, and its optimiser."""
    machine = Machine.of(recipe, folder)
    materials, setup, R, P = machine.materials, machine.setup, recipe.answer.max_tokens, recipe.grpo.prompts
    law = Law(jnp.asarray(never_sampled(materials.tokenizer, recipe.model.text.vocab)), materials.automaton, None, R)
    of_batch = lambda batch: supervised_flops(  # noqa: E731
        recipe.model, matmul_weights(recipe.model), 0, float(batch.prompt.length_P.sum()), float(batch.length_PG.sum())
    )
    steps = rows // P or int(flops / of_batch(lessons(materials.train.batch(0, P), materials, R)))
    optimizer = make_optimizer(recipe.grpo.optimizer, steps)
    step = make_step(setup, law, optimizer, "loss")
    reference = setup.reference(machine.params)
    state, losses, spent, began = setup.state(machine.params, optimizer, recipe.seed), [], 0.0, time.monotonic()
    with jax.set_mesh(setup.mesh):
        for k in range(steps):
            batch = lessons(materials.train.batch(k, P), materials, R)
            spent += of_batch(batch)
            state, metrics = step(state, reference, place_rows(batch, setup.mesh), width=R)
            losses.append(metrics["loss"])
    losses = [float(loss) for loss in losses]
    cost = {"seconds": time.monotonic() - began, "flops": spent, "steps": steps, "rows": steps * P}
    return {"cost": cost, "loss": losses, "after": machine.judge(merge(state.params, reference))}


def states(machine: Machine, pipeline: Pipeline) -> tuple[np.ndarray, list[Example]]:
    """The base model's last hidden state at the end of each prompt, float32 [rows, D]; training rows in the order of their first epoch."""
    P, programs = machine.recipe.grpo.validate_prompts, machine.programs
    weights, found, rows = programs.gather(machine.params), [], []
    for k in range(-(-len(pipeline) // P)):
        batch = pipeline.batch(k, P)
        prompt = place_rows(batch.prompt, programs.mesh)
        found.append(
            np.asarray(programs.prefill(weights, prompt, programs.encode(weights, prompt)).hidden_PD, np.float32)[: len(batch.rows)]
        )
        rows += [example for example, _ in batch.rows]
    return np.concatenate(found)[: len(pipeline)], rows[: len(pipeline)]


def by_classifier(make: Callable, train_X, train: list[Example], held_X, held: list[Example]) -> dict:
    """A logistic regression, its penalty by cross-validation on the training rows."""
    model = make(GridSearchCV(LogisticRegression(max_iter=2000), {"C": np.logspace(-4, 4, 9)}, scoring="neg_log_loss"))
    model.fit(train_X, [e.request_label == "unsafe" for e in train])
    return {"after": plain_rows(held, model.predict_proba(held_X)[:, 1])}


def plain_rows(held: list[Example], score: np.ndarray) -> dict[str, list]:
    return {
        "id": [e.id for e in held],
        "group": [short_group(e) for e in held],
        "unsafe": [int(e.request_label == "unsafe") for e in held],
        "said": [int(value > 0.5) for value in score],
        "score": [round(float(value), 4) for value in logit(np.clip(score, 1e-15, 1 - 1e-15))],
    }


def by_probe(recipe: Recipe, folder: Path) -> dict:
    """Linear probe of the base model's states."""
    machine = Machine.of(recipe, folder)
    make = lambda model: make_pipeline(StandardScaler(), model)  # noqa: E731
    return by_classifier(make, *states(machine, machine.materials.train), *states(machine, machine.materials.held_out))


def kept(recipe: Recipe, folder: Path) -> tuple[list[Example], list[Example]]:
    """The rows that the pipelines keep, of training and held out."""
    folder.mkdir(parents=True, exist_ok=True)
    materials = make_materials(recipe, folder)
    return tuple([p._examples[k] for k in p.kept] for p in (materials.train, materials.held_out))  # type: ignore[return-value]


def by_words(recipe: Recipe, folder: Path) -> dict:
    """TF-IDF of words and pairs of words, and logistic regression."""
    train, held = kept(recipe, folder)
    texts = lambda rows: [row.request or "" for row in rows]  # noqa: E731
    make = lambda model: make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), model)  # noqa: E731
    return by_classifier(make, texts(train), train, texts(held), held)


def by_majority(recipe: Recipe, folder: Path, of_source: bool) -> dict:
    """The share of unsafe training rows, of all of them or of the row's source."""
    train, held = kept(recipe, folder)
    counts = Counter((of_source and e.source, e.request_label == "unsafe") for e in train)
    share = lambda key: counts[key, True] / max(counts[key, True] + counts[key, False], 1)  # noqa: E731
    return {"after": plain_rows(held, np.array([share(of_source and e.source) for e in held]))}
