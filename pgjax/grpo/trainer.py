"""GRPO, top to bottom: one step is `grpo_step`, a run is `train`.

The arrays of a step, where they come from and how they lie (rows: leading axis over data and fsdp):

    batch, gold      PromptBatch, Gold: host, by prompt      data/pipeline.py, a function of (seed, step)
    policy           parameters: the trained ones, and the reference's where they are not trained    train/trainable.py
    weights          the policy in the compute type, gathered over fsdp
    visual           visual tokens [P, M, D], by prompt      those of a frozen tower serve scoring and update too
    start            prompt caches [L, P, K, T, C]           generate/decode.py
    rollout          tokens [P, G, R], lengths [P, G]        generate/decode.py, through the lanes of generate/lanes.py
    judged           verdict and reward [P, G], by prompt    automaton.py, rewards.py
    choice           which prompts, in which order           generate/score.py: rows of n prompts, alike in length
    rows             n prompts, their answers packed [Q]     generate/score.py; on each device the rows of its own prompts
    old, ref         logprobs [rows, Q]                      the policy before the updates, where there are several, and the reference
    experience       all of it with advantages, by row       grpo/advantages.py
    state            trained parameters, optimiser, sharded  train/update.py, one update per mini-batch of whole rows
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.bank import Bank
from pgjax.config import Recipe
from pgjax.data.schema import Gold, PromptBatch
from pgjax.evaluation.evaluate import Answered, evaluate
from pgjax.evaluation.metrics import Scores, ends, summarise, table
from pgjax.evaluation.samples import sample_rows
from pgjax.files import remove_folder
from pgjax.generate.law import Law
from pgjax.grpo.programs import Judge, Programs
from pgjax.parallel.mesh import make_mesh, place_rows, share_of
from pgjax.parallel.start import agree, first_alone, preemption, stop
from pgjax.recipes import to_json
from pgjax.sft.warm_up import train as train_warm_up
from pgjax.tokenizer import never_sampled
from pgjax.train.checkpoints import Checkpoints, due
from pgjax.train.compilations import Compilations
from pgjax.train.flops import matmul_weights, peak, phase_metrics
from pgjax.train.inputs import check_inputs, make_room
from pgjax.train.materials import Materials, make_materials
from pgjax.train.phases import Phases
from pgjax.train.progress import Progress
from pgjax.train.report import write_report
from pgjax.train.run_folder import RunFolder, check_same_run, ended, read_metrics, remove_run
from pgjax.train.setup import Setup, make_setup
from pgjax.train.trainable import frozen_tower, merge
from pgjax.train.update import Skips, TrainState, make_optimizer


def load(materials: Materials, recipe: Recipe, mesh, step: int) -> tuple[PromptBatch, Gold]:
    """Prompts and gold of a step on their devices."""
    host = materials.train.batch(step, recipe.grpo.prompts * recipe.rollout.oversample)
    return place_rows((host.prompt, host.gold), mesh)


def grpo_step(
    programs: Programs, bank: Bank, recipe: Recipe, state: TrainState, reference: dict, step: int, loaded: tuple[PromptBatch, Gold], done
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: sample G answers to each of P prompts, judge them against each other, update. Step counts from 0.

    `done(phase, outputs)` hears of every phase when it has been dispatched.
    """
    batch, gold = loaded
    policy = merge(state.params, reference)
    weights = programs.gather(policy)
    visual = programs.encode(weights, batch)
    done("encode", visual)
    start = programs.prefill(weights, batch, visual)
    done("prefill", start.hidden_PD)
    rollout, slots = programs.decode(weights, batch, gold, start, jnp.int32(step), group=recipe.rollout.group, greedy=False)
    done("decode", rollout)
    del weights, start  # the gathered copy serves the rollout alone
    visual = visual if frozen_tower(recipe.model) else None  # a trained tower: each program encodes

    selects = recipe.rollout.oversample > 1
    judged = programs.judge(rollout, gold, bank) if selects else None
    choice, width = programs.choose(rollout, judged, gold)
    rows = programs.arrange(rollout, batch, gold, choice, visual, width=width)
    old_PQ = programs.score(policy, rows) if recipe.grpo.scores_policy else None
    ref_PQ = programs.score(reference, rows)
    done("score", (old_PQ, ref_PQ))
    judged = judged or programs.judge(rollout, gold, bank)  # names are read while the device scores
    experience, metrics = programs.experience(rollout, judged, batch, gold, choice, rows, old_PQ, ref_PQ, slots)
    done("reward", metrics)

    updates = []
    for index in range(recipe.grpo.prompts // recipe.grpo.mini_prompts):
        state, update_metrics = programs.update(state, reference, experience, jnp.int32(index))
        updates.append(update_metrics)
    done("update", updates)
    return state, metrics | programs.average(*updates)


def warm_up(recipe: Recipe, setup: Setup, materials: Materials, params: dict, run: RunFolder, show: bool) -> dict:
    """The supervised stage of a toy recipe: it teaches the format, ids and names drawn at random, and a share of the labels."""
    blocked_V = jnp.asarray(never_sampled(materials.tokenizer, recipe.model.text.vocab))
    law = Law(blocked_V, materials.automaton, None, recipe.answer.max_tokens)

    def answers(batch, step: int):
        rngs = [np.random.default_rng((recipe.seed, step, int(id))) for id in batch.prompt.id_P]  # by row, whichever process has it
        right_P = np.array([rng.random() < recipe.warm_up.label_share for rng in rngs])
        rows = zip(rngs, batch.rows, right_P, strict=True)
        return [materials.warm_up_answers(rng, example, view, bool(right)) for rng, (example, view), right in rows], right_P

    with Progress("warm-up", recipe.warm_up.steps, show=show) as progress:

        def log(step: int, metrics: Mapping[str, float]) -> None:
            run.log(step, metrics, "warm_up")
            progress.update(step, loss=metrics["warm_up/loss"])

        return train_warm_up(recipe, setup, law, params, materials.train, answers, materials.tokenizer, log)


def validate(programs: Programs, materials: Materials, recipe: Recipe, policy: dict, run: RunFolder, step: int, show: bool) -> Scores:
    """Score the held-out split with greedy answers, write them as samples, and the report anew.

    The first and the last validation have intervals, and write evaluation.json.
    """
    rows: list[dict] = []

    def seen(answered: Answered) -> None:
        rows.extend(sample_rows(answered, materials.taxonomy, recipe.shows_content))
        progress.update(len(rows))

    with Progress("evaluate", len(materials.held_out), show=show) as progress:
        weights = programs.gather(policy)
        scored = evaluate(programs, weights, materials.held_out, materials.full_bank, recipe.grpo.validate_prompts, seen)
        scores = summarise(scored)
        if step in (0, recipe.grpo.steps):
            found = table(scored)
            scores |= ends(found)
            run.write_json("evaluation.json", {"step": step} | found)
        run.log(step, scores, "eval")
    run.samples(step, rows)
    if show:
        write_report(run.path, recipe.shows_content)
    return scores


def train(recipe: Recipe, run_path: Path, fresh: bool = False, profile: bool = False) -> dict[str, float]:
    """Run a recipe in its folder, from the last checkpoint there unless `fresh`; returns the summary that it also writes.

    A killed run, started again, gives the numbers of an unbroken one: all that a step depends on is the checkpoint, the reference and
    its own number. After SIGTERM it saves and raises Preempted. Raises ValueError when the folder holds the run of another recipe. A run
    that has ended only gives its summary. With several processes only the first one returns a summary.
    `profile` writes a trace of its third step into profile/.
    """
    began, show, config = time.monotonic(), jax.process_index() == 0, recipe.grpo
    mesh = make_mesh(recipe.mesh)
    agree("recipe", f"{to_json(recipe)} {fresh}")
    check_inputs(recipe, mesh)  # before an earlier run is dropped and a folder is made
    with first_alone():
        if fresh and show:
            remove_run(run_path)
        new = make_room(run_path)
    checkpoints, references = Checkpoints(run_path / "checkpoints", config.keep_checkpoints), Checkpoints(run_path / "reference", 1)
    start = checkpoints.latest()
    agree("newest checkpoint", str(start))
    if start is not None and references.latest() is None:
        raise ValueError(f"run {run_path} has checkpoints and no reference/, which they go with; put it back, or give --fresh")
    if start is not None:
        check_same_run(run_path, recipe)
        if start == config.steps and (summary := ended(run_path, start, show)):
            return summary

    with RunFolder(run_path, recipe, show, start) as run:
        try:
            materials = make_materials(recipe, run_path, share_of(mesh))
        except ValueError:  # no data: a folder made for nothing goes again
            if new and show:
                remove_folder(run_path)
            raise
        if show and recipe.data.buckets > 1:
            print(f"data: {materials.train.padding()}", file=sys.stderr)
        setup = make_setup(recipe.model, mesh)
        optimizer = make_optimizer(config.optimizer, config.steps * (config.prompts // config.mini_prompts))
        programs = Programs(recipe, setup, optimizer, materials.automaton, materials.tokenizer, Judge(materials.embedder, materials.bank))
        if start is None:
            checkpoints.clear(), references.clear()
            params = setup.load(recipe.checkpoint) if recipe.checkpoint else setup.init(recipe.seed)
            if recipe.warm_up.steps:
                params = warm_up(recipe, setup, materials, params, run, show)
            reference = setup.reference(params)
            state = setup.state(params, optimizer, recipe.seed)
            del params
            references.save(0, reference)
            scores = validate(programs, materials, recipe, merge(state.params, reference), run, 0, show)
            checkpoints.save(0, state, scores.get("request_f1") if config.keep_best else None)
        else:
            state, reference = checkpoints.restore(setup.abstract_state(optimizer)), references.restore(setup.abstract_reference())

        compilations, phases, weights, skips = Compilations(), Phases(), matmul_weights(recipe.model), Skips(config.optimizer)
        pending: list[Callable[[], None]] = []  # numbers of a step are read when the next one has been dispatched

        def logged(
            step: int, metrics: Mapping[str, jax.Array], slots: dict[str, int], compiled: dict, waited: float, seconds: Callable[[], dict]
        ) -> None:
            values = {name: float(value) for name, value in metrics.items()}
            counts = {name.removeprefix("count/"): values.pop(name) for name in metrics if name.startswith("count/")}
            values |= phase_metrics(recipe, weights, seconds(), counts, mesh.size, peak(jax.devices()[0]))
            values["data/padding"] = 1 - counts["prompt"] / slots["prompt"]
            if counts["patches"]:
                values["data/patch_padding"] = 1 - counts["patches"] / slots["patches"]
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            run.log(step, values | compiled | {"perf/host_memory_gb": memory, "timing_s/wait_for_batch": waited})
            skips.see(step, values["actor/skipped"])
            progress.update(step, reward=values["critic/rewards/mean"], parsed=values["reward/format"])

        def catch_up() -> None:
            while pending:
                pending.pop()()

        first, ahead = start or 0, partial(load, materials, recipe, mesh)
        with (
            Progress("train", config.steps, start=first, show=show) as progress,
            ThreadPoolExecutor(1, "load") as loader,
            preemption() as preempted,
        ):
            upcoming = loader.submit(ahead, first)
            for step in range(first, config.steps):
                clock = time.monotonic()
                loaded = upcoming.result()
                waited = time.monotonic() - clock
                if step + 1 < config.steps:
                    upcoming = loader.submit(ahead, step + 1)
                with traced(run_path / "profile", profile and show and step == min(first + 2, config.steps - 1)) as finish:
                    phases.begin()
                    state, metrics = grpo_step(programs, materials.bank, recipe, state, reference, step, loaded, phases.done)
                    seconds = phases.split()
                    finish(metrics)
                catch_up()
                slots = {"prompt": loaded[0].tokens_PT.size, "patches": loaded[0].image_PI.size}
                pending.append(partial(logged, step + 1, metrics, slots, compilations.metrics(), waited, seconds))
                ending = preempted(step + 1)
                scores = {}
                if due(step + 1, config.validate_every, config.steps):
                    catch_up()
                    scores = validate(programs, materials, recipe, merge(state.params, reference), run, step + 1, show)
                if ending or due(step + 1, config.checkpoint_every, config.steps):
                    catch_up()
                    checkpoints.save(step + 1, state, scores.get("request_f1") if config.keep_best else None)
                    if ending and step + 1 < config.steps:
                        stop(step + 1, show)
        summary = summarise_run(run_path, time.monotonic() - began) if show else {}
        run.write_json("summary.json", summary)
    checkpoints.close(), references.close()
    return summary


@contextmanager
def traced(folder: Path, wanted: bool) -> Iterator[Callable]:
    """A trace of what happens inside, for Perfetto and XProf; yields what waits for the last outputs that belong to it."""
    if not wanted:
        yield lambda outputs: None
        return
    with jax.profiler.trace(str(folder), create_perfetto_trace=True):
        yield jax.block_until_ready
    print(f"trace: {folder} (XProf), and perfetto_trace.json.gz in it (https://ui.perfetto.dev)", file=sys.stderr)


def summarise_run(run_path, seconds: float) -> dict[str, float]:
    """The run in ten numbers, all read from its own metrics.jsonl; a score that the held-out split does not define is null."""
    rows = read_metrics(run_path)
    rewards = [row["critic/rewards/mean"] for row in rows if row["phase"] == "train"]
    scores = [row for row in rows if row["phase"] == "eval"]
    before, after = scores[0], scores[-1]
    summary = {"seconds": round(seconds, 1), "reward_first": float(np.mean(rewards[:10])), "reward_last": float(np.mean(rewards[-10:]))}
    for name, key in (("f1", "request_f1"), ("ood_f1", "ood_f1"), ("naming", "naming")):
        summary |= {f"{name}_before": before.get(key), f"{name}_after": after.get(key)}
    return summary | {"parse_failures_after": after["parse_failures"]}
