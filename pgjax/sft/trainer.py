"""The supervised trainer: raise the log-probability of given answers to chats with pictures. Rows, update, mesh, checkpoints and run
folder are those of GRPO; where the lessons come from is the caller's business.
"""

import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from pgjax.config import Recipe
from pgjax.files import new_folder, read_json, remove_folder, replace_file
from pgjax.generate.law import Law
from pgjax.parallel.mesh import make_mesh, place_rows, share_of
from pgjax.parallel.start import agree, first_alone, preemption, stop
from pgjax.recipes import to_json
from pgjax.sft.lessons import Batch, Lesson, Lessons
from pgjax.sft.report import write_report
from pgjax.sft.step import make_loss, make_step
from pgjax.tokenizer import load_tokenizer, never_sampled
from pgjax.train.checkpoints import Checkpoints, due
from pgjax.train.compilations import Compilations
from pgjax.train.flops import matmul_weights, peak, rates, supervised_flops
from pgjax.train.inputs import check_start, make_room
from pgjax.train.materials import new_tokenizer
from pgjax.train.phases import Phases
from pgjax.train.progress import Progress
from pgjax.train.run_folder import RunFolder, check_same_run, ended, read_metrics, remove_run
from pgjax.train.setup import make_setup
from pgjax.train.trainable import split
from pgjax.train.update import Skips, make_optimizer


def digest(*splits: Sequence[Lesson]) -> str:
    """Names lessons by what they say, wherever their pictures lie."""
    told = [[(x.id, x.group, x.messages, [path.name for path in x.images], x.answer) for x in lessons] for lessons in splits]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def texts(lessons: Sequence[Lesson]) -> Iterator[str]:
    """What a toy recipe's tokenizer is trained on."""
    for lesson in lessons:
        for message in lesson.messages:
            parts = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
            yield from (f"{message['role']}\n{part['text']}" for part in parts if part["type"] == "text")
        yield f"assistant\n{lesson.answer}"


def keep_facts(folder: Path, lessons: Sequence[Lesson], digest: str, splits: Mapping[str, Lessons]) -> None:
    """Writes lessons.json, with its shapes as `buckets`, and groups.json, the groups of all lessons
    to train on: no fair test has them."""
    folder.mkdir(exist_ok=True)
    replace_file(folder / "groups.json", json.dumps(sorted({lesson.group for lesson in lessons}), ensure_ascii=False) + "\n")
    facts = {name: {"lessons": len(of.kept), "dropped": of.dropped, "buckets": of.shapes()} for name, of in splits.items()}
    replace_file(folder / "lessons.json", json.dumps({"digest": digest} | facts, indent=1) + "\n")


def train(recipe: Recipe, run_path: Path, lessons: Sequence[Lesson], held_out: Sequence[Lesson], fresh: bool = False) -> dict[str, float]:
    """Run a recipe in its folder, from the last checkpoint there unless `fresh`; returns the summary that it also writes.

    A killed run, started again, gives the numbers of an unbroken one: a step depends on the checkpoint and on its own number. After
    SIGTERM it saves and raises Preempted. Raises ValueError when the folder holds the run of another recipe, or of other lessons. A run
    that has ended only gives its summary. With several processes only the first one returns a summary.
    """
    began, show, config = time.monotonic(), jax.process_index() == 0, recipe.sft
    mesh = make_mesh(recipe.mesh)
    agree("recipe", f"{to_json(recipe)} {fresh}")
    check_start(recipe, mesh)
    setup, facts, told = make_setup(recipe.model, mesh), run_path / "data" / "lessons.json", digest(lessons, held_out)
    start = None if fresh else latest(run_path / "checkpoints")
    agree("newest checkpoint", str(start))
    if start is not None:
        check_same_run(run_path, recipe)
        if read_json(facts)["digest"] != told:
            raise ValueError(f"run {run_path} was started with other lessons; go on with them, take another --name, or give --fresh")
        if start == config.steps and (summary := ended(run_path, start, show)):
            return summary
    tokenizer = new_tokenizer(recipe, texts(lessons)) if start is None else load_tokenizer(run_path / "tokenizer")
    how = (tokenizer, recipe, mesh.shape["data"] * mesh.shape["fsdp"])
    taught, tested = Lessons(lessons, *how, True, share_of(mesh)), Lessons(held_out, *how, False, share_of(mesh))
    if show and taught.dropped:
        print(
            f"sft: {taught.dropped.total()} of {len(lessons)} lessons do not fit and are left out: {dict(taught.dropped)}", file=sys.stderr
        )
    abstract_frozen = split(setup.abstract_reference(), recipe.model)[1]

    with first_alone():
        if fresh and show:  # all that can be wrong has been looked at
            remove_run(run_path)
        make_room(run_path)
    with (
        Checkpoints(run_path / "checkpoints", config.keep_checkpoints) as checkpoints,
        Checkpoints(run_path / "reference", 1) as references,
        RunFolder(run_path, recipe, show, start) as run,
    ):
        if start is None and show:
            remove_folder(run_path / "tokenizer")  # of other lessons, perhaps
            with new_folder(run_path / "tokenizer") as aside:
                tokenizer.save_pretrained(aside)
        if show:
            keep_facts(facts.parent, lessons, told, {"train": taught, "eval": tested})
        law = Law(jnp.asarray(never_sampled(tokenizer, recipe.model.text.vocab)), None, None, recipe.answer.max_tokens)
        optimizer = make_optimizer(config.optimizer, config.steps)
        step = make_step(setup, law, optimizer, "sft/loss", taught.per_row, config.prompts // config.micro_prompts)
        loss = make_loss(setup, law, tested.per_row)

        if start is None:
            params = setup.load(recipe.checkpoint) if recipe.checkpoint else setup.init(recipe.seed)
            frozen = split(setup.reference(params), recipe.model)[1] if abstract_frozen else {}
            state = setup.state(params, optimizer, recipe.seed)
            del params
            references.clear()  # of a run that was killed before its first checkpoint
            if frozen:
                references.save(0, frozen)
        else:
            state = checkpoints.restore(setup.abstract_state(optimizer))
            frozen = references.restore(abstract_frozen) if abstract_frozen else {}

        def load(k: int) -> Batch:
            batch = taught.batch(k)
            return batch._replace(taught=place_rows(batch.taught, mesh))

        def validate(k: int) -> float:
            """Mean loss per token of the held-out lessons after k steps; logs it and writes the report anew."""
            total = tokens = 0.0
            with Progress("evaluate", len(tested), show=show) as progress:
                for n in range(len(tested)):
                    batch = tested.batch(n)
                    more, counted = loss(state.params, frozen, place_rows(batch.taught, mesh), width=batch.width)
                    total, tokens = total + float(more), tokens + float(counted)
                    progress.update(n + 1, loss=total / tokens)
            if not math.isfinite(mean := total / tokens):  # nothing after it would be worth a checkpoint
                raise ValueError(
                    f"the held-out loss after step {k} is {mean}; lower sft.optimizer.learning_rate and start over with --fresh"
                )
            run.log(k, {"loss": mean, "perplexity": math.exp(min(mean, 700)), "tokens": tokens}, "eval")  # 700: where exp ends
            if show:
                write_report(run_path)
            return mean

        compilations, phases, weights, skips = Compilations(), Phases(), matmul_weights(recipe.model), Skips(config.optimizer)
        pending: list[Callable[[], None]] = []  # numbers of a step are read when the next one has been dispatched

        def logged(k: int, metrics: Mapping[str, jax.Array], counts: Mapping[str, int], host: dict, seconds: Callable[[], dict]) -> None:
            took, tokens = seconds(), counts["prompt"] + counts["answer"]
            flops = supervised_flops(recipe.model, weights, counts["patches"], counts["prompt"], counts["answer"])
            values = {name: float(value) for name, value in metrics.items()} | {"data/padding": 1 - tokens / counts["slots"]}
            values |= rates("update", took["update"], tokens, flops, mesh.size, peak(jax.devices()[0]))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            run.log(k, values | host | {"perf/time_per_step": took["step"], "perf/host_memory_gb": memory}, "sft")
            skips.see(k, values["actor/skipped"])
            progress.update(k, loss=values["sft/loss"])

        def catch_up() -> None:
            while pending:
                pending.pop()()

        first = start or 0
        with jax.set_mesh(mesh), ThreadPoolExecutor(1, "load") as loader, preemption() as preempted:
            if start is None:
                validate(0)
            with Progress("sft", config.steps, start=first, show=show) as progress:
                upcoming = loader.submit(load, min(first, config.steps - 1))
                for k in range(first, config.steps):
                    clock = time.monotonic()
                    batch = upcoming.result()
                    waited = time.monotonic() - clock
                    if k + 1 < config.steps:
                        upcoming = loader.submit(load, k + 1)
                    phases.begin()
                    state, metrics = step(state, frozen, batch.taught, width=batch.width)
                    phases.done("update", metrics)
                    catch_up()
                    host = compilations.metrics() | {"timing_s/wait_for_batch": waited}
                    pending.append(partial(logged, k + 1, metrics, batch.counts, host, phases.split()))
                    score, ending = None, preempted(k + 1)
                    if due(k + 1, config.validate_every, config.steps):
                        catch_up()
                        score = -validate(k + 1)
                    if ending or due(k + 1, config.checkpoint_every, config.steps):
                        catch_up()
                        checkpoints.save(k + 1, state, score if config.keep_best else None)
                        if ending and k + 1 < config.steps:
                            stop(k + 1, show)
        summary = summarise_run(run_path, time.monotonic() - began) if show else {}
        run.write_json("summary.json", summary)
    return summary


def latest(folder: Path) -> int | None:
    """The newest checkpoint there."""
    if not folder.is_dir():
        return None
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest()


def summarise_run(run_path: Path, seconds: float) -> dict[str, float]:
    """The run in a few numbers, all read from its own metrics.jsonl."""
    rows = read_metrics(run_path)
    before, *_, after = (row for row in rows if row["phase"] == "eval")
    steps = [row for row in rows if row["phase"] == "sft"]
    ten = lambda rows: sum(row["sft/loss"] for row in rows) / len(rows)  # noqa: E731
    summary = {"seconds": round(seconds, 1), "loss_first": ten(steps[:10]), "loss_last": ten(steps[-10:])}
    summary |= {"held_out_loss_before": before["loss"], "held_out_loss_after": after["loss"], "perplexity_after": after["perplexity"]}
    return summary | {"padding": sum(row["data/padding"] for row in steps) / len(steps)}
