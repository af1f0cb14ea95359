"""A whole GRPO step beside its own floor: what its phases must compute and move, at the rates that the device reaches here.

    python benchmarks/floor.py [--model small|toy|NAME] [--prompts 8] [--group 16] [--limit 128] [--law lognormal] [--steps 3] [--json]
                               [any other key of a recipe, such as --rollout.lanes 4 --model.compute-dtype bfloat16]

One device; toy conversations with pictures, the whole reward, the toy recipe's loss, four lanes a prompt, one update on all prompts.
`small` is the decoder of benchmarks/vs_trl.py with 6M parameters, `toy` that of the demo, other names are released shapes
(pgjax/models/released.py); weights are random. Answers end at lengths drawn from laws of benchmarks/lengths.py, all with a mean of 0.29
of the limit. The step is grpo/trainer.py's own, timed as in a run by train/phases.py; every step has the same prompts, keys and lengths.

floor_seconds of a phase is the larger of

* FLOPs / matmul rate. FLOPs are train/flops.py's (matmul parameters, the head on response tokens) and those of attention: for each
  query and layer 4 C H for every key that it sees; three times that in the update, once for each of the models that are scored;
* in decode, bytes / copy rate. Bytes: the decoder and the head once for every token that all lanes sample at a time, a prompt's cache
  once for each of its row's, an answer's own cache, as long as it is by then, once for each of its tokens.

The matmul rate is the best of some shapes in the compute type, the copy rate that of an array as large as the weights (read and written).
The floor has no padding, recomputation, optimiser, sampling, nor anything on the host; the reward's is 0.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from lengths import LAWS, forced, quantiles
from roofline import PHASES, floors, rates
from timing import show
from vs_trl import make_recipe

from pgjax.config import AnswerConfig, GRPOConfig, MeshConfig, Recipe, RolloutConfig
from pgjax.grpo.programs import Judge, Programs
from pgjax.grpo.trainer import grpo_step, load
from pgjax.models.released import RELEASED
from pgjax.parallel.mesh import make_mesh
from pgjax.recipes import load_recipe, override, validate
from pgjax.train.flops import matmul_weights, phase_metrics
from pgjax.train.materials import make_materials
from pgjax.train.phases import Phases
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer


def step_recipe(model: str, prompts: int, group: int, limit: int) -> Recipe:
    toy = load_recipe("toy")
    small = dataclasses.replace(make_recipe("small").model.text, vocab=toy.model.text.vocab)
    models = {"toy": toy.model, "small": dataclasses.replace(toy.model, text=small)} | RELEASED
    return dataclasses.replace(
        toy,
        name=f"floor {model}",
        model=models[model],
        mesh=MeshConfig(),
        devices=0,
        data=dataclasses.replace(toy.data, train_examples=max(64, 4 * prompts), eval_examples=8),
        answer=AnswerConfig(max_tokens=limit),
        rollout=RolloutConfig(group=group, lanes=min(4, group)),
        grpo=GRPOConfig(prompts=prompts, mini_prompts=prompts, micro_prompts=prompts, loss=toy.grpo.loss),
    )


def measure(recipe: Recipe, law: str, steps: int, matmul: float, copy: float) -> tuple[list[dict], dict]:
    """Rows {law, phase, seconds, share, floor_seconds, ratio} with medians of `steps` steps after one, and the sizes of the step.
    `matmul` and `copy` are the device's rates, FLOP/s and bytes/s."""
    setup = make_setup(recipe.model, make_mesh(MeshConfig(), jax.devices()[:1]))
    with tempfile.TemporaryDirectory() as folder:
        materials = make_materials(recipe, Path(folder))
    optimizer = make_optimizer(recipe.grpo.optimizer, steps)
    programs = Programs(recipe, setup, optimizer, materials.automaton, materials.tokenizer, Judge(materials.embedder, materials.bank))
    params, loaded = setup.init(0), load(materials, recipe, setup.mesh, 0)
    reference = setup.reference(params)
    state, phases, laps, rollouts = setup.state(params, optimizer), Phases(), [], []

    def done(phase: str, outputs) -> None:
        phases.done(phase, outputs)
        if phase == "decode":
            rollouts[:] = [outputs]

    with forced(quantiles(law, recipe.answer.max_tokens), np.asarray(materials.automaton.stop_V)):
        for _ in range(1 + steps):
            phases.begin()
            state, metrics = grpo_step(programs, materials.bank, recipe, state, reference, 0, loaded, done)
            laps.append(phases.split()())
    seconds = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}

    weights, length_PG = matmul_weights(recipe.model), np.asarray(rollouts[0].length_PG)
    counts = {name.removeprefix("count/"): float(value) for name, value in metrics.items() if name.startswith("count/")}
    found = phase_metrics(recipe, weights, seconds, counts, 1, None)
    floor = floors(recipe, loaded[0], length_PG, {phase: found[f"perf/flops/{phase}"] for phase in PHASES}, matmul, copy)
    floor, seconds["whole step"] = floor | {"whole step": sum(floor.values())}, seconds["step"]
    notes = {
        "parameters": sum(x.size for x in jax.tree.leaves(reference)),
        "prompt_tokens": counts["prompt"] / len(length_PG),
        "answer_tokens": counts["response"] / length_PG.size,
    }
    rows = [
        {"law": law, "phase": phase, "seconds": seconds[phase], "share": seconds[phase] / seconds["step"], "floor_seconds": least,
         "ratio": seconds[phase] / least if least else None}
        for phase, least in floor.items()
    ]  # fmt: skip
    return rows, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["small", "toy", *RELEASED], default="small")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--limit", type=int, default=128, help="most tokens of an answer")
    parser.add_argument("--law", choices=LAWS, nargs="+", default=["lognormal"], help="of the answers' lengths")
    parser.add_argument("--steps", type=int, default=3, help="that count, after one that does not")
    parser.add_argument("--json", action="store_true")
    args, keys = parser.parse_known_args()
    try:
        recipe = validate(override(step_recipe(args.model, args.prompts, args.group, args.limit), keys))
    except ValueError as error:
        parser.error(str(error))
    weights, dtype = matmul_weights(recipe.model), recipe.model.compute_dtype
    matmul, copy = rates(dtype, (weights.decoder + weights.head) * jnp.dtype(dtype).itemsize)
    rows = []
    for law in args.law:
        of_law, notes = measure(recipe, law, args.steps, matmul, copy)
        rows += of_law
    title = (
        f"A GRPO step beside its floor ({args.model}, {notes['parameters'] / 1e6:.2f}M parameters, {recipe.model.compute_dtype}, one "
        f"device): {recipe.grpo.prompts} prompts of {notes['prompt_tokens']:.0f} tokens (mean), {recipe.rollout.group} answers to each "
        f"through {recipe.rollout.lanes or recipe.rollout.group} lanes, "
        f"{notes['answer_tokens']:.0f} (mean, under the last law) of at most {recipe.answer.max_tokens} tokens; medians of {args.steps} "
        f"steps. Matmuls reach {matmul / 1e9:.3g} GFLOP/s, copies {copy / 1e9:.3g} GB/s."
    )
    show(rows, args.json, title)


if __name__ == "__main__":
    main()
