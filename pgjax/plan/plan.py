"""Compile a recipe for hardware that is not here, before the bill: what fits, what moves, and what a step takes at least.

The programs are those of `grpo_step`, walked through without arrays (walk.py). TPUs are compiled for by libtpu. For GPUs the same programs
are compiled for as many CPU devices: their partitioning and its collectives are the same, temporaries only about so (attention is in
loops there instead of in kernels), and nothing is refused.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.config import Recipe
from pgjax.grpo.programs import Judge
from pgjax.models.sentence_encoder import load_embedder
from pgjax.parallel.mesh import make_mesh
from pgjax.plan.chips import GIB, Topology
from pgjax.plan.count import collectives, flops
from pgjax.plan.walk import Call, chip_bytes, walk
from pgjax.taxonomy import load_taxonomy
from pgjax.tokenizer import byte_tokenizer, load_tokenizer
from pgjax.train.flops import matmul_weights
from pgjax.train.materials import cache_dir, grid, make_banks
from pgjax.train.setup import make_setup
from pgjax.train.update import make_optimizer

ROLLOUT = ("gather", "encode", "prefill", "decode")
LEARNING = ("arrange", "score", "experience", "update")  # what of a step grows with the micro-batch

COMPILERS = {"tpu": "libtpu", "gpu": "XLA for GPUs", "cpu": "XLA for CPU devices in place of GPUs"}


@dataclass
class Program:
    """One program as compiled. Bytes are of one chip; FLOPs and collectives of all its runs in a step, on all chips and on one."""

    name: str
    times: int
    fits: bool
    why: str | None  # it does not
    peak_bytes: int | None  # with what else a step holds then
    beside_bytes: int  # of that
    argument_bytes: int | None
    temporary_bytes: int | None
    limit_bytes: int
    flops: int
    collectives: dict[str, int]
    floor_seconds: float


class Planner:
    """Compiles for a topology; what has been compiled before is not compiled again."""

    def __init__(self, recipe: Recipe, topology: Topology, devices: list[jax.Device]):
        self.recipe, self.topology = recipe, topology
        self.mesh = make_mesh(recipe.mesh, devices)
        self.setup, self.taxonomy = make_setup(recipe.model, self.mesh), load_taxonomy(recipe.data.taxonomy)
        # Without a checkpoint the automaton is that of single bytes: its table is small either way.
        self.tokenizer = load_tokenizer(recipe.checkpoint) if recipe.checkpoint else byte_tokenizer()
        text, tag = recipe.model.text, recipe.answer.think_tag
        self.automaton: Automaton = answers.build(self.tokenizer, grid(self.taxonomy), tag, vocab=text.vocab, cache_dir=cache_dir())
        embedder = load_embedder(recipe.reward.embedder)
        self.judge = Judge(embedder, make_banks(recipe, self.taxonomy, embedder)[0])
        self.shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self._compiled: dict[str, tuple] = {}

    def held(self) -> dict[str, int]:
        """What a chip holds also between steps."""
        trained = self.setup.abstract_state(make_optimizer(self.recipe.grpo.optimizer, 1))
        return {"state": chip_bytes(trained), "reference": chip_bytes(self.setup.abstract_reference())}

    def programs(self, recipe: Recipe, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Program]:
        for call in walk(recipe, self.setup, self.automaton, self.tokenizer, self.judge, len(self.taxonomy.nodes)):
            if wanted(call.name):
                yield self._measured(call, recipe)

    def _measured(self, call: Call, recipe: Recipe) -> Program:
        chip, limit, turns = self.topology.chip, int(self.topology.chip.memory), self.turns(recipe)
        runs = turns if call.name == "decode" else ()
        memory, moved, why = self._compile(call, runs)
        peak = None if memory is None else memory["peak"] + call.beside
        if why is None and peak > limit:
            own, beside = memory["peak"] / GIB, call.beside / GIB
            why = f"{own:.2f} GiB and {beside:.2f} GiB that the step holds beside it are more than {limit / GIB:.2f} GiB"
        work = flops(call.traced.jaxpr.jaxpr, runs) * call.times
        moved = {kind: size * call.times for kind, size in moved.items()}
        read = (memory or {}).get("arguments", 0) * call.times
        if call.name == "decode":
            read = turns[0] * turns[1] * self.token_bytes(recipe)
        floor = max(work / self.mesh.size / chip.flops, read / chip.bandwidth, sum(moved.values()) / chip.link)
        sizes = (memory or {}).get("arguments"), (memory or {}).get("temporaries")
        return Program(call.name, call.times, why is None, why, peak, call.beside, *sizes, limit, work, moved, floor)

    def _compile(self, call: Call, runs: tuple[int, ...]) -> tuple[dict | None, dict, str | None]:
        """Bytes by kind, collectives, and why it does not compile."""
        lowered = call.traced.lower()
        about = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if about not in self._compiled:
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                self._compiled[about] = None, {}, " ".join(str(error).split("\n")[0].split())[:300]
            else:
                m = compiled.memory_analysis()
                memory = dict(peak=m.peak_memory_in_bytes, arguments=m.argument_size_in_bytes, temporaries=m.temp_size_in_bytes)
                self._compiled[about] = memory, collectives(compiled.as_text(), runs), None
        return self._compiled[about]

    def turns(self, recipe: Recipe) -> tuple[int, int]:
        """How often a row takes a prompt, which is a wave, and token steps of each: every answer has R tokens."""
        by, P = recipe.rollout, recipe.grpo.prompts * recipe.rollout.oversample
        return -(-P // min(by.rows or P, P)), -(-by.group // (by.lanes or by.group)) * recipe.answer.max_tokens

    def token_bytes(self, recipe: Recipe) -> float:
        """What a chip reads for a step of decoding at least: decoder and head, and the prompt caches of its rows."""
        text, tensor, size = recipe.model.text, self.mesh.shape["tensor"], jnp.dtype(recipe.model.compute_dtype).itemsize
        weights, P = matmul_weights(recipe.model), recipe.grpo.prompts * recipe.rollout.oversample
        rows, heads = min(recipe.rollout.rows or P, P) // self.shards, text.kv_heads // (tensor if text.kv_heads % tensor == 0 else 1)
        cache = 2 * text.layers * heads * text.head_dim * recipe.data.prompt_tokens * rows
        return size * ((weights.decoder + weights.head) / tensor + cache)

    def with_rows(self, rows: int) -> Recipe:
        return replace(self.recipe, rollout=replace(self.recipe.rollout, rows=rows))

    def with_micro(self, micro: int) -> Recipe:
        return replace(self.recipe, grpo=replace(self.recipe.grpo, micro_prompts=micro))


def largest(most: int, shards: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of most, most / 2, ... that all shards share evenly and that fits."""
    while most % shards == 0:
        if fits(most):
            return most
        if most % 2:
            return None
        most //= 2
    return None


def plan(recipe: Recipe, topology: Topology, devices: list[jax.Device]) -> dict:
    """What `pgjax plan` prints. Micro-batch and rollout rows are the recipe's where they fit, else the largest that do."""
    planner = Planner(recipe, topology, devices)
    P, minis = recipe.grpo.prompts * recipe.rollout.oversample, recipe.grpo.mini_prompts
    all_fit = lambda recipe, names: all(program.fits for program in planner.programs(recipe, names.__contains__))  # noqa: E731
    rows = largest(P, planner.shards, lambda rows: all_fit(planner.with_rows(rows % P), ROLLOUT))
    micro = largest(minis, planner.shards, lambda micro: all_fit(planner.with_micro(micro), LEARNING))
    settings = {}
    if rows is not None and rows < (recipe.rollout.rows or P):
        settings["rollout.rows"] = rows
    if micro is not None and micro < recipe.grpo.micro_prompts:
        settings["grpo.micro_prompts"] = micro
    planned = planner.with_rows(settings.get("rollout.rows", recipe.rollout.rows))
    planned = replace(planned, grpo=replace(planned.grpo, micro_prompts=settings.get("grpo.micro_prompts", recipe.grpo.micro_prompts)))
    programs = list(planner.programs(planned))
    chip = asdict(topology.chip)
    return {
        "recipe": recipe.name,
        "topology": topology.name,
        "chips": topology.count,
        "mesh": dict(planner.mesh.shape),
        "compiler": COMPILERS[devices[0].platform],
        "fits": all(program.fits for program in programs),
        "held_bytes": planner.held(),
        "settings": settings,
        "largest": {"rollout.rows": rows, "grpo.micro_prompts": micro},
        "waves": None if rows is None else -(-P // rows),
        "floor_seconds": sum(program.floor_seconds for program in programs),
        "assumed": chip | {"answer_tokens": recipe.answer.max_tokens},
        "programs": [asdict(program) for program in programs],
    }
