"""GRPO, top to bottom: one step is `grpo_step`, a run is `train`.

The arrays of a step, where they come from and how they lie (rows: leading axis over data and fsdp):

    batch, gold      PromptBatch, Gold: host, rows          data/pipeline.py, a function of (seed, step)
    weights          parameters in the compute type, gathered over fsdp
    rollout          tokens [P, G, R], lengths [P, G], rows  generate/decode.py
    judged           verdict and reward [P, G], rows         automaton.py, rewards.py
    packed           answers back to back [P, Q], rows       generate/score.py
    old, ref         logprobs [P, Q], rows                   the policy before the update, and the reference
    experience       all of it with advantages [P, G], rows  grpo/advantages.py
    state            parameters and optimiser, sharded       train/update.py, one update per mini-batch of whole groups
"""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.config import Recipe
from pgjax.data.toy import toy_answers
from pgjax.evaluation.evaluate import Answered, evaluate
from pgjax.generate.law import Law
from pgjax.grpo.programs import Judge, Programs, never_sampled
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.sft import trainer as sft
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.compilations import Compilations
from pgjax.train.materials import Materials, make_materials
from pgjax.train.progress import Progress
from pgjax.train.run_folder import RunFolder, read_metrics
from pgjax.train.setup import Setup, make_setup
from pgjax.train.update import TrainState, make_optimizer


def grpo_step(
    programs: Programs, materials: Materials, recipe: Recipe, state: TrainState, reference: dict, step: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: sample G answers to each of P prompts, judge them against each other, update. Step counts from 0."""
    host = materials.train.batch(step, recipe.grpo.prompts)
    batch, gold = place_rows((host.prompt, host.gold), programs.mesh)

    weights = programs.gather(state.params)
    rollout = programs.rollout(weights, batch, gold, jnp.int32(step), group=recipe.rollout.group, greedy=False)
    judged = programs.judge(rollout, gold, materials.bank)

    packed = programs.pack(rollout, programs.packed_width(rollout))
    old_PQ = programs.score(state.params, batch, packed, gold)
    ref_PQ = programs.score(reference, batch, packed, gold)
    experience, metrics = programs.experience(rollout, judged, batch, gold, packed, old_PQ, ref_PQ)

    updates = []
    for index in range(recipe.grpo.prompts // recipe.grpo.mini_prompts):
        state, update_metrics = programs.update(state, experience, jnp.int32(index))
        updates.append(update_metrics)
    return state, metrics | {name: jnp.stack([u[name] for u in updates]).mean() for name in updates[0]}


def warm_up(recipe: Recipe, setup: Setup, materials: Materials, params: dict, run: RunFolder, show: bool) -> dict:
    """The supervised stage of a toy recipe: it teaches the format, ids and names drawn at random, and a share of the labels."""
    blocked_V = jnp.asarray(never_sampled(materials.tokenizer, recipe.model.text.vocab))
    law = Law(blocked_V, materials.automaton, jnp.ones((1, 1), bool), recipe.answer.max_tokens)

    def answers(batch, step: int):
        rng, never_seen = np.random.default_rng((recipe.seed, step)), recipe.data.ood.never_seen
        right_P = rng.random(len(batch.rows)) < recipe.sft.label_share
        texts = [
            toy_answers(rng, example, view, materials.taxonomy, recipe.sft.answers, bool(right), recipe.answer.think_tag, never_seen)
            for (example, view), right in zip(batch.rows, right_P, strict=True)
        ]
        return texts, right_P

    with Progress("warm-up", recipe.sft.steps, show=show) as progress:

        def log(step: int, metrics: Mapping[str, float]) -> None:
            run.log(step, metrics, "sft")
            progress.update(step, loss=metrics["sft/loss"])

        return sft.train(recipe, setup, law, params, materials.train, answers, materials.tokenizer, log)


def validate(programs: Programs, materials: Materials, recipe: Recipe, state: TrainState, run: RunFolder, step: int, show: bool) -> None:
    """Score the held-out split with greedy answers, and write them as samples."""
    rows: list[dict] = []

    def seen(answered: Answered) -> None:
        rows.extend(sample_rows(answered, materials, recipe.data.name == "toy"))
        progress.update(len(rows))

    with Progress("evaluate", len(materials.held_out), show=show) as progress:
        weights = programs.gather(state.params)
        run.log(step, evaluate(programs, weights, materials.held_out, materials.full_bank, recipe.grpo.validate_prompts, seen), "eval")
    run.samples(step, rows)


def sample_rows(answered: Answered, materials: Materials, content: bool) -> list[dict]:
    """What samples/STEP.jsonl keeps of each held-out row: ids and codes; the answer's text for generated data alone."""
    rows = []
    for p, (example, view) in enumerate(answered.batch.rows):
        verdict = {name: int(value[p]) for name, value in vars(answered.verdict).items()}
        row = {
            "id": example.id,
            "modality": example.modality,
            "request_label": example.request_label,
            "response_label": example.response_label,
        }
        row |= {"node": example.node, "shown": [shown for shown, _ in view.entries], "verdict": verdict}
        if content:
            length = int(answered.rollout.length_PG[p, 0])
            row["answer"] = materials.tokenizer.decode(answered.rollout.tokens_PGR[p, 0, :length], skip_special_tokens=True)
        rows.append(row)
    return rows


def train(recipe: Recipe, run_path, fresh: bool = False) -> dict[str, float]:
    """Run a recipe in its folder, from the last checkpoint there unless `fresh`; returns the summary that it also writes."""
    began, show = time.monotonic(), jax.process_index() == 0
    mesh = make_mesh(recipe.mesh)
    materials = make_materials(recipe, run_path)
    setup = make_setup(recipe.model, mesh)
    config = recipe.grpo
    optimizer = make_optimizer(config.optimizer, config.steps * (config.prompts // config.mini_prompts))
    programs = Programs(recipe, setup, optimizer, materials.automaton, materials.tokenizer, Judge(materials.embedder, materials.bank))
    checkpoints, references = Checkpoints(run_path / "checkpoints", config.keep_checkpoints), Checkpoints(run_path / "reference", 1)
    start = checkpoints.latest() if references.latest() is not None else None

    with RunFolder(run_path, recipe, show, start) as run:
        if start is None:
            params = setup.load(recipe.checkpoint) if recipe.checkpoint else setup.init(recipe.seed)
            if recipe.sft.steps:
                params = warm_up(recipe, setup, materials, params, run, show)
            references.save(0, params)
            state, reference = setup.state(params, optimizer)
            validate(programs, materials, recipe, state, run, 0, show)
            checkpoints.save(0, state)
        else:
            state, reference = checkpoints.restore(setup.abstract_state(optimizer)), references.restore(setup.abstract_params())

        compilations = Compilations()
        with Progress("train", config.steps, start=start or 0, show=show) as progress:
            for step in range(start or 0, config.steps):
                clock = time.monotonic()
                state, metrics = grpo_step(programs, materials, recipe, state, reference, step)
                values = {name: float(value) for name, value in metrics.items()}
                values |= {"perf/time_per_step": time.monotonic() - clock, "perf/compilations": compilations.take()}
                run.log(step + 1, values)
                progress.update(step + 1, reward=values["critic/reward_mean"], parsed=values["reward/format"])
                if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
                    validate(programs, materials, recipe, state, run, step + 1, show)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    checkpoints.save(step + 1, state)
        summary = summarise_run(run_path, time.monotonic() - began)
        run.write_json("summary.json", summary)
    checkpoints.close(), references.close()
    return summary


def summarise_run(run_path, seconds: float) -> dict[str, float]:
    """The run in ten numbers, all read from its own metrics.jsonl; a score that the held-out split does not define is null."""
    rows = read_metrics(run_path)
    rewards = [row["critic/reward_mean"] for row in rows if row["phase"] == "train"]
    scores = [row for row in rows if row["phase"] == "eval"]
    before, after = scores[0], scores[-1]
    summary = {"seconds": round(seconds, 1), "reward_first": float(np.mean(rewards[:10])), "reward_last": float(np.mean(rewards[-10:]))}
    for name, key in (("f1", "request_f1"), ("ood_f1", "ood_f1"), ("naming", "naming")):
        summary |= {f"{name}_before": before.get(key), f"{name}_after": after.get(key)}
    return summary | {"parse_failures_after": after["parse_failures"]}
