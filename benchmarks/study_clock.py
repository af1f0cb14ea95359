"""Time to reward of pgjax and of TRL's GRPOTrainer: the reward of each step's answers against wall-clock seconds.

    python benchmarks/study_clock.py [--steps N] [--seeds 3] [--json]        (needs the extra `trl`; on a quiet machine)

Both start from one checkpoint, the toy recipe's model after its supervised warm-up, which knows the answer format. What is the same:

* The rows (the toy's text rows), and the prompts of step k: pgjax's batch k of the seed, in order, as the same token ids.
* Group size, temperature, answer limit; the recipe's loss (k3 penalty, entropy bonus, means over tokens) with TRL's constant beside
  the group's std, and without the dual clip, which does nothing where a step is one update; learning rate, AdamW, clipping; float32.
* The judge: TRL's token ids go through pgjax's automaton, rules and bank.
* The cores, held to by each side's process, one after the other. TRL has the fastest of vs_trl.py's settings, tried beforehand.

What is not:

* The clocks run from the first step's beginning, with whatever is compiled or set up in it and later (persistent compilation cache
  off; the first step is also shown apart); not for loading, which is in `process_seconds`. TRL's clock stands still while its
  answers are judged; pgjax's runs.
* pgjax loads each batch and reads each step's numbers before the next step; its trainer overlaps them.
* Sampled answers differ: two random generators. Both sides' answers end at <|im_end|>, <|endoftext|> or the limit, and count whole.
* pgjax's law, sampled and scored, lacks vision tokens and ChatML's <|im_start|>. TRL does not sample them either (they are
  suppressed), but its scores and its entropy are those of the whole vocabulary.
* pgjax's vision tower is frozen; TRL's is in the optimiser and never gets a gradient. No row has a picture.
* TRL generates by transformers' loop over tokens. On an accelerator it would have vLLM: the figures are about CPUs, and there is no
  accelerator form.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, show

from pgjax import automaton as answers
from pgjax.config import MeshConfig, Recipe, WarmUpConfig
from pgjax.conversation import messages
from pgjax.data.build import build_dataset
from pgjax.data.schema import Gold
from pgjax.data.toy import ORDER, toy_examples
from pgjax.export import write_checkpoint
from pgjax.generate.decode import Rollout
from pgjax.generate.labels import answer_scorer
from pgjax.generate.law import Law
from pgjax.generate.score import answer_rows
from pgjax.grpo.programs import Judge, Programs
from pgjax.grpo.trainer import grpo_step, load, warm_up
from pgjax.parallel.mesh import make_mesh, place_rows
from pgjax.recipes import load_recipe, validate
from pgjax.taxonomy import render_policy
from pgjax.tokenizer import never_sampled
from pgjax.train.compilations import Compilations
from pgjax.train.materials import Materials, make_materials
from pgjax.train.setup import Setup, make_setup
from pgjax.train.update import make_optimizer

STEPS = {"tiny": 3, "pilot": 75}  # of each form
CORES = 2
TRIAL = 3  # steps for which each of TRL's settings is tried; the first does not count
WINDOW = 5  # steps whose mean is the reward that has been reached
LEVELS = (1.0, 1.25, 1.5, 1.75, 2.0)
TRL_STD_EPS = 1e-4  # trl 1.16, trainer/grpo_trainer.py: advantages / (std_rewards + 1e-4)

Ids = list[list[list[int]]]  # of answers, by prompt


def make_recipe(form: str, seed: int, folder: Path) -> Recipe:
    """What both sides are given. ValueError for a form that there is not."""
    if form not in STEPS:
        raise ValueError(f"form {form!r}: there are {', '.join(STEPS)}; TRL without vLLM is measured on a CPU alone")
    toy = load_recipe("toy")
    loss = dataclasses.replace(toy.grpo.loss, dual_clip=0.0, std_eps=TRL_STD_EPS)
    optimizer = dataclasses.replace(toy.grpo.optimizer, weight_decay=0.0)  # TRL's would pass over biases and norms
    data = dataclasses.replace(toy.data, name="built", root=str(folder / "data"), patches=toy.model.vision.window_patches)
    grpo = dataclasses.replace(toy.grpo, loss=loss, optimizer=optimizer)
    recipe = dataclasses.replace(toy, name="clock", seed=seed, mesh=MeshConfig(), devices=0, data=data, grpo=grpo)
    if form == "tiny":
        text = dataclasses.replace(toy.model.text, vocab=1040, width=32, kv_heads=2, head_dim=8, mlp=64, mrope_section=(2, 1, 1))
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(toy.model, text=text),
            tokenizer_vocab=1024,
            data=dataclasses.replace(data, train_examples=96, eval_examples=24),
            rollout=dataclasses.replace(toy.rollout, group=4),
            warm_up=WarmUpConfig(steps=2, prompts=4),
            grpo=dataclasses.replace(grpo, prompts=4, mini_prompts=4, micro_prompts=4),
        )
    return validate(recipe)


def prepare(recipe: Recipe, folder: Path, _steps: int) -> dict:
    """The text rows as a data set, `folder`/data, and the warmed-up model as a checkpoint directory, `folder`/model."""
    data, one_in = recipe.data, len(ORDER) // ORDER.count("text")
    rows = toy_examples(recipe.seed, one_in * data.train_examples, one_in * data.eval_examples, data.ood.never_seen)
    build_dataset([row for row in rows if row.modality == "text"], folder / "data")
    (folder / "run").mkdir(), (folder / "model").mkdir()
    materials, setup = make_materials(recipe, folder / "run"), make_setup(recipe.model, make_mesh(recipe.mesh, jax.devices()[:1]))
    params = warm_up(recipe, setup, materials, setup.init(recipe.seed), SimpleNamespace(log=lambda *_: None), show=False)
    write_checkpoint(folder / "model", recipe, params, materials.tokenizer, "float32")
    return {}


class Side(NamedTuple):
    """What a side's process has before its clock begins."""

    recipe: Recipe
    materials: Materials
    setup: Setup
    programs: Programs


def make_side(recipe: Recipe, folder: Path) -> Side:
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, freeze_vision=True))
    m, setup = make_materials(recipe, folder / "run"), make_setup(recipe.model, make_mesh(recipe.mesh, jax.devices()[:1]))
    optimizer = make_optimizer(recipe.grpo.optimizer, recipe.grpo.steps)
    return Side(recipe, m, setup, Programs(recipe, setup, optimizer, m.automaton, m.tokenizer, Judge(m.embedder, m.bank)))


def ours(recipe: Recipe, folder: Path, steps: int) -> dict:
    """pgjax's steps: seconds since the first began, rewards, and the programs compiled in each."""
    recipe, materials, setup, programs = make_side(recipe, folder)
    params, compilations = setup.load(folder / "model"), Compilations()
    reference, state = setup.reference(params), setup.state(params, make_optimizer(recipe.grpo.optimizer, recipe.grpo.steps))
    jax.block_until_ready((reference, state)), compilations.take()
    seconds, rewards, compiled = [], [], []
    began = time.perf_counter()
    for step in range(steps):
        loaded = load(materials, recipe, setup.mesh, step)
        state, metrics = grpo_step(programs, materials.bank, recipe, state, reference, step, loaded, lambda *_: None)
        jax.block_until_ready(state)
        rewards.append(float(metrics["critic/rewards/mean"]))
        seconds.append(time.perf_counter() - began)
        compiled.append(compilations.take())
    return {"seconds": seconds, "reward": rewards, "first_step_seconds": seconds[0], "compilations": compiled}


def judge_ids(side: Side, ids_PG: Ids, gold: Gold) -> np.ndarray:
    """Rewards [P, G] of answers as token ids, stop token included. Other special tokens are passed over, as in their decoded text."""
    tokens_PGR, length_PG = answer_rows(ids_PG, side.recipe.answer.max_tokens)
    modality_PG = np.repeat(gold.modality_P[:, None], length_PG.shape[1], axis=1)
    final_PG = jax.jit(answers.run)(side.materials.automaton, tokens_PGR, length_PG, modality_PG)
    unread_PGR = np.zeros(tokens_PGR.shape, np.float32)
    given = place_rows((Rollout(tokens_PGR, unread_PGR, unread_PGR, length_PG, np.asarray(final_PG)), gold), side.setup.mesh)
    return np.asarray(side.programs.judge(*given, side.materials.bank).reward_PG)


def logprob_gap(side: Side, folder: Path, ids_PG: Ids, theirs_PG: list[list[list[float]]], prompt) -> float:
    """The largest difference between pgjax's logprobs of answers, by the model that both start from, and those given."""
    limit = side.recipe.answer.max_tokens
    law = Law(jnp.zeros(side.recipe.model.text.vocab, bool), None, None, limit)  # TRL scores over the whole vocabulary
    logp_PQ = answer_scorer(side.setup.model, law, side.setup.mesh)(side.setup.load(folder / "model"), prompt, *answer_rows(ids_PG, limit))
    flat = [[value for answer in group for value in answer] for group in theirs_PG]
    return max(float(np.abs(logp_Q[: len(own)] - own).max()) for logp_Q, own in zip(logp_PQ, flat, strict=True))


def trl_steps(side: Side, folder: Path, steps: int, attention: str, threads: int) -> tuple[dict, list, dict]:
    """TRL's steps (seconds since the first began without those of judging, rewards), pgjax's batches, and what TRL made of the first."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(threads)
    recipe, train, tokenizer = side.recipe, side.materials.train, side.materials.tokenizer
    P, G, loss, optimizer = recipe.grpo.prompts, recipe.rollout.group, recipe.grpo.loss, recipe.grpo.optimizer
    batches = [train.batch(step) for step in range(steps)]

    def text(example, view) -> str:
        policy = render_policy(train.taxonomy, view, recipe.data.descriptions)
        chat = messages(example, policy, train.prompts, recipe.answer.think_tag)
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    rows = Dataset.from_list([{"prompt": text(*row), "number": k} for k, batch in enumerate(batches) for row in batch.rows])
    made: dict = {"seconds": [], "reward": [], "judging_seconds": 0.0}
    first: dict = {}

    def reward(completion_ids, number, **_) -> list[float]:
        began = time.perf_counter()
        [step] = set(number)
        assert step == len(made["reward"]), "TRL takes the prompts in another order"
        reward_PG = judge_ids(side, [completion_ids[p * G : (p + 1) * G] for p in range(P)], batches[step].gold)
        made["reward"].append(float(reward_PG.mean()))
        made["judging_seconds"] += time.perf_counter() - began
        return reward_PG.reshape(-1).tolist()

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            made["seconds"].append(time.perf_counter() - self.began - made["judging_seconds"])

    class Keeping(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            experience = super()._generate_and_score_completions(inputs)
            first.update({} if first else experience)
            return experience

    config = GRPOConfig(
        max_steps=steps, per_device_train_batch_size=P * G, num_generations=G, shuffle_dataset=False, seed=recipe.seed,
        max_completion_length=recipe.answer.max_tokens, temperature=recipe.rollout.temperature,
        generation_kwargs={"suppress_tokens": np.flatnonzero(never_sampled(tokenizer, recipe.model.text.vocab)).tolist()},
        # Under "dapo" the loss is the mean over all tokens of the batch; `epsilon` clips alike on both sides, unlike DAPO's.
        loss_type="dapo", epsilon=loss.clip_low, beta=loss.kl_coef, use_bias_correction_kl=False, entropy_coef=loss.entropy_coef,
        learning_rate=optimizer.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=optimizer.warmup_steps,
        adam_beta1=optimizer.b1, adam_beta2=optimizer.b2, weight_decay=optimizer.weight_decay, max_grad_norm=optimizer.grad_clip,
        use_cpu=True, bf16=False, gradient_checkpointing=False, model_init_kwargs={"dtype": "float32", "attn_implementation": attention},
        output_dir=str(folder / "out"), report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Keeping(str(folder / "model"), reward, config, rows, processing_class=tokenizer, callbacks=[Clock()]).train()
    return made | {"first_step_seconds": made["seconds"][0]}, batches, first


def trial(recipe: Recipe, folder: Path, _steps: int) -> dict:
    """TRL's fastest setting, in a process of its own, so that what is set up once is in its first step."""
    side, settings = make_side(recipe, folder), [(attention, n) for attention in ("sdpa", "eager") for n in (CORES, 1)]
    laps = {setting: np.diff(trl_steps(side, folder, TRIAL, *setting)[0]["seconds"]) for setting in settings}
    return dict(zip(("attention", "threads"), min(settings, key=lambda setting: np.median(laps[setting])), strict=True))


def theirs(recipe: Recipe, folder: Path, steps: int) -> dict:
    """TRL's steps under its fastest setting. RuntimeError where its model is not pgjax's."""
    side, setting = make_side(recipe, folder), json.loads((folder / "trial.json").read_text())
    made, batches, first = trl_steps(side, folder, steps, **setting)
    P, G, mask = recipe.grpo.prompts, recipe.rollout.group, first["completion_mask"] > 0
    by_prompt = lambda x: [[x[b][mask[b]].tolist() for b in range(p * G, (p + 1) * G)] for p in range(P)]  # noqa: E731
    gap = logprob_gap(side, folder, by_prompt(first["completion_ids"]), by_prompt(first["ref_per_token_logps"]), batches[0].prompt)
    if gap > 1e-4:
        raise RuntimeError(f"the sides score the same answers differently, by {gap:.1e}: they do not run the same model")
    return made | {"logprob_gap": gap} | setting


PROCESSES = {"warm_up": prepare, "trial": trial, "trl": theirs, "pgjax": ours}


def run(form: str, seed: int, workdir: Path, steps: int | None = None) -> dict:
    """{"pgjax", "trl": {"seconds" and "reward" by step, "first_step_seconds", ...}, "settings"}; each side in a process of its own.

    `workdir` is an empty folder. RuntimeError where a process fails.
    """
    recipe, steps, found = make_recipe(form, seed, workdir), steps or STEPS[form], {}
    # Without jax's persistent cache a first step costs what it costs on a new machine.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"JAX_PLATFORMS": "cpu", "NPROC": str(CORES), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for name in PROCESSES:
        command = [sys.executable, __file__, "--process", name, "--folder", str(workdir), "--form", form, "--seed", str(seed)]
        began = time.perf_counter()
        done = subprocess.run([*command, "--steps", str(steps)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        found[name] = json.loads((workdir / f"{name}.json").read_text()) | {"process_seconds": time.perf_counter() - began}
    settings = {"form": form, "seed": seed, "steps": steps, "cores": CORES, "prompts": recipe.grpo.prompts, "group": recipe.rollout.group}
    settings |= {"answer_tokens": recipe.answer.max_tokens, "warm_up_steps": recipe.warm_up.steps}
    settings |= {"loss": dataclasses.asdict(recipe.grpo.loss), "optimizer": dataclasses.asdict(recipe.grpo.optimizer)}
    return {"pgjax": found["pgjax"], "trl": found["trl"], "settings": settings}


def reached(side: dict, level: float) -> tuple[int, float] | tuple[None, None]:
    """(steps, seconds) after which the mean reward of the last WINDOW steps is at `level` for the first time."""
    rewards, ends = side["reward"], range(WINDOW, len(side["reward"]) + 1)
    step = next((n for n in ends if statistics.fmean(rewards[n - WINDOW : n]) >= level), None)
    return (step, side["seconds"][step - 1]) if step else (None, None)


def table(runs: list[dict]) -> list[dict]:
    """A row for each seed and level, None where it is not reached; `ratio` is TRL's seconds over pgjax's. A level of None is the end."""
    rows = []
    for one in runs:
        for level in (*LEVELS, None):
            end = lambda side: (len(side["seconds"]), side["seconds"][-1])  # noqa: E731
            (step, ours_s), (trl_step, trl_s) = (reached(one[s], level) if level else end(one[s]) for s in ("pgjax", "trl"))
            row = {"seed": one["settings"]["seed"], "reward": level, "pgjax_step": step, "pgjax_s": ours_s}
            rows.append(row | {"trl_step": trl_step, "trl_s": trl_s, "ratio": trl_s / ours_s if ours_s and trl_s else None})
    return rows


def pace(runs: list[dict], side: str) -> dict[str, float]:
    """Medians over the seeds: seconds of the first step, and the median and mean of those after it."""
    laps = [np.diff(one[side]["seconds"]) for one in runs]
    found = {"first": [one[side]["first_step_seconds"] for one in runs], "median": map(np.median, laps), "mean": map(np.mean, laps)}
    return {name: float(statistics.median(values)) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--form", choices=STEPS, default="pilot")
    parser.add_argument("--steps", type=int, help="of each side; default: the form's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    for name, kind in (("process", str), ("folder", Path), ("seed", int)):  # one of a run's
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
        found = PROCESSES[args.process](make_recipe(args.form, args.seed, args.folder), args.folder, args.steps)
        (args.folder / f"{args.process}.json").write_text(json.dumps(found))
        return
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(args.form, seed, Path(folder), args.steps))
    paces = {side: pace(runs, side) for side in ("pgjax", "trl")}
    if args.json:
        print(json.dumps({"machine": machine(), "runs": runs, "rows": table(runs), "pace": paces}))
        return
    words = [f"{side} {p['first']:.3g}, then median {p['median']:.3g} and mean {p['mean']:.3g}" for side, p in paces.items()]
    title = f"Seconds from the first step's beginning until the mean reward of {WINDOW} steps reaches a level (None: the last step's end)."
    show(table(runs), False, f"{title} Seconds of the first step, and of one after it: {'; '.join(words)}.")


if __name__ == "__main__":
    main()
