"""Where the slots of a rollout go: the lanes of generate/lanes.py at several laws of lengths, without a model.

    python benchmarks/rollout.py [--rows 64 ...] [--lanes 4 ...] [--shards 1 8] [--prompts 512] [--group 16] [--limit 1024]
                                 [--mean 300] [--micro 8 32] [--json]

The schedule's own functions run as decoding runs them, on given lengths in place of tokens. Every answer's length is drawn for itself;
the laws are those of benchmarks/lengths.py, with one mean.

* waste: lane slots computed for each token, in all, and before the tail (which begins when some row has nothing left to do);
* static_waste: that of a loop that decodes all answers at once until the longest has ended: P G max / sum;
* pad_share, micro n: empty slots among those of the update's packed rows, as `Programs` chooses rows and width, on 8 devices, in
  mini-batches of configs/proguard_7b.py and micro-batches of n prompts (each device packs n / 8 prompts in a row).

Targets at mean 300 of at most 1024: waste at most 1.25 before the tail and 1.5 in all, pad_share at most 0.1.
"""

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from lengths import LAWS, quantiles
from timing import show

from pgjax.config import GRPOConfig
from pgjax.generate.lanes import Schedule, Slots, advance, empty, take_answers, take_prompts
from pgjax.generate.score import packed_width
from pgjax.grpo.programs import chosen
from pgjax.recipes import load_recipe

DEVICES = 8  # of configs/proguard_7b.py


@partial(jax.jit, static_argnames=("rows", "lanes", "shards"))
def slots_of(length_PG: jax.Array, *, rows: int, lanes: int, shards: int) -> Slots:
    """The slots of a rollout of answers of these lengths."""
    P, G = length_PG.shape
    first_N = jnp.arange(rows) // (rows // shards) * (P // shards)  # the first prompt of each row's shard

    def begin(schedule: Schedule) -> Schedule:
        return take_answers(take_prompts(schedule))[0]

    def one_token(carry):
        schedule, slots = carry
        prompt_N = first_N + jnp.minimum(schedule.prompt_N, schedule.prompts - 1)
        ended_NS = schedule.offset_NS + 1 >= length_PG[prompt_N[:, None], schedule.sample_NS]
        return begin(advance(schedule, ended_NS)), slots.count(schedule)

    start = begin(empty(P, G, rows, lanes, shards)), Slots.none()
    return jax.lax.while_loop(lambda carry: carry[0].busy_NS.any(), one_token, start)[1]


def pad_share(length_PG: np.ndarray, config: GRPOConfig, limit: int, step: float) -> float:
    """update/pad_share of a step whose answers have these lengths, on 8 devices."""
    P, G = length_PG.shape
    choice = jax.jit(chosen, static_argnums=(2, 3))(length_PG, np.ones(P, bool), config, DEVICES)
    answers = config.micro_prompts // DEVICES * G
    width = packed_width(int(choice.longest), answers * limit, step)
    return float(1 - length_PG.sum() / (P * G // answers * width))


def measure(
    prompts: int, group: int, rows: list[int], lanes: list[int], shards: list[int], limit: int, mean: float, micro: list[int]
) -> list[dict]:
    """Rows {law, shards, rows, lanes, mean, max, waste_before_tail, waste, static_waste, and pad_share for each number of micro-batch
    prompts}; what shards do not divide is left out. RuntimeError where the slots that gave a token are not as many as tokens."""
    recipe, found = load_recipe("proguard_7b"), []
    mini = min(recipe.grpo.mini_prompts, prompts)
    configs = {n: dataclasses.replace(recipe.grpo, prompts=prompts, mini_prompts=mini, micro_prompts=n) for n in micro}
    for law in LAWS:
        length_PG = np.random.default_rng(0).choice(quantiles(law, limit, mean), (prompts, group))
        pads = {f"pad_share, micro {n}": pad_share(length_PG, c, limit, recipe.rollout.packed_step) for n, c in configs.items()}
        for W, N, S in ((w, n, s) for w in shards for n in rows for s in lanes if n % w == 0 and prompts % w == 0):
            slots = slots_of(length_PG, rows=N, lanes=S, shards=W)
            if (used := int(slots.used.sum())) != length_PG.sum():
                raise RuntimeError(f"{law}, {N} rows of {S} lanes on {W} shards: {used} tokens of {length_PG.sum()}")
            before_tail, waste = map(float, slots.waste())
            sizes = {"law": law, "shards": W, "rows": N, "lanes": S, "mean": float(length_PG.mean()), "max": int(length_PG.max())}
            wasted = {"waste_before_tail": before_tail, "waste": waste, "static_waste": float(length_PG.max() / length_PG.mean())}
            found.append(sizes | wasted | pads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[64], help="over all shards")
    parser.add_argument("--lanes", type=int, nargs="+", default=[4])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 8], help="of the batch: data x fsdp")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--limit", type=int, default=1024)
    parser.add_argument("--mean", type=float, default=300)
    parser.add_argument("--micro", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    title = f"Slots of a rollout of {args.prompts} prompts with {args.group} answers of at most {args.limit} tokens each, for every token."
    show(measure(**{name: value for name, value in vars(args).items() if name != "json"}), args.json, title)


if __name__ == "__main__":
    main()
