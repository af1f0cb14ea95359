"""A step without arrays: `grpo_step` itself is called with shapes, and every program that it would run is traced for the plan's mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import jax
import jax.numpy as jnp

from pgjax.automaton import Automaton
from pgjax.config import Recipe
from pgjax.data.schema import Gold, PromptBatch
from pgjax.generate.score import packed_width
from pgjax.grpo.programs import Choice, Judge, Programs
from pgjax.grpo.trainer import grpo_step
from pgjax.models.qwen_vl import patch_values
from pgjax.parallel.mesh import replicated, rows
from pgjax.parallel.program import Program
from pgjax.train.setup import Setup
from pgjax.train.update import make_optimizer


class Shape(jax.ShapeDtypeStruct):
    """An array that is not there. It is itself and no other, so that what a step still holds can be counted."""

    __hash__, __eq__ = object.__hash__, object.__eq__


def chip_bytes(tree) -> int:
    """Of shapes with shardings, what lies on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclass
class Call:
    """A program that a step runs `times` times with the same shapes, and the bytes a chip that others hold while it runs."""

    name: str
    traced: Any
    beside: int
    times: int = 1


class Walked(Programs):
    """Programs that give shapes and are noted in `calls`, in their order."""

    def __init__(self, recipe: Recipe, setup: Setup, optimizer, automaton: Automaton, tokenizer, judge: Judge):
        super().__init__(recipe, setup, optimizer, automaton, tokenizer, judge)
        self.calls: dict[Any, Call] = {}
        self.live: WeakSet[Shape] = WeakSet()
        self.encoder = self.everywhere(self.encoder)
        for name, program in list(vars(self).items()):
            if isinstance(program, Program):
                setattr(self, name, self._noted(name.strip("_"), program))

    def shape(self, x, sharding) -> Shape:
        made = Shape(jnp.shape(x), jnp.result_type(x), sharding=sharding)
        self.live.add(made)
        return made

    def everywhere(self, tree):
        """Shapes of arrays that lie on every device."""
        return jax.tree.map(lambda x: self.shape(x, replicated(self.mesh)), tree)

    def as_placed(self, tree):
        """Shapes of shapes, where they are said to lie."""
        return jax.tree.map(lambda x: self.shape(x, x.sharding), tree)

    def of_rows(self, dtype, *shape: int) -> Shape:
        return self.shape(jax.ShapeDtypeStruct(shape, dtype), rows(self.mesh))

    def _noted(self, name: str, program: Program) -> Callable:
        def plain(x) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=x.sharding if isinstance(x, Shape) else None)

        def call(*args, **kwargs):
            given = jax.tree.map(plain, args)
            about = name, str(jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), given)), str(kwargs)
            known = self.calls.setdefault(about, Call(name, None, 0, 0))
            known.traced = known.traced or program.trace(*given, **kwargs)
            mine = [x for x in jax.tree.leaves(args) if isinstance(x, Shape)]
            known.times, known.beside = known.times + 1, max(known.beside, chip_bytes(list(self.live.difference(mine))))
            donated = jax.tree.leaves(jax.tree.map(lambda x: x.donated, known.traced.args_info[0]))
            self.live -= {x for x, gone in zip(jax.tree.leaves(args), donated, strict=True) if gone}
            out = known.traced.out_info
            return jax.tree.map(self.shape, out, jax.tree.broadcast(program.out, out))

        return call

    def loaded(self, nodes: int, ids: int) -> tuple[PromptBatch, Gold]:
        """What `Pipeline.batch` gives for a step: P prompts of T tokens and I patches, as much as the largest bucket may hold."""
        data, i, f = self.recipe.data, jnp.int32, jnp.float32
        P, T, I = self.recipe.grpo.prompts * self.recipe.rollout.oversample, data.prompt_tokens, data.patches
        of = lambda dtype, *shape: self.of_rows(dtype, P, *shape)  # noqa: E731
        patches = of(f, I, patch_values(self.recipe.model)), of(i, I, 2), of(i, I, 2), of(i, I)
        batch = PromptBatch(of(i, T), of(i), of(i, T, 3), of(i), of(i, T), *patches, of(jnp.uint32))
        return batch, Gold(of(i), of(i), of(i), of(i), of(i), of(i, ids), of(bool, nodes), of(bool), of(f))

    def names(self, rollout, gold):
        """A name in every answer, the most that there may be."""
        (P, G), W, B = rollout.length_PG.shape, self.recipe.reward.name_tokens, 8 * self.shards
        while B < P * G:
            B *= 2
        return tuple(self.of_rows(jnp.int32, *shape) for shape in ((B, W), (B, W), (P, G)))

    def choose(self, rollout, judged, gold) -> tuple[Choice, int]:
        """The widest rows."""
        choice = self._choose(rollout.length_PG, self.of_rows(bool, *gold.weight_P.shape))
        most = self.answers_of_row * self.recipe.answer.max_tokens
        return choice, packed_width(most, most, self.recipe.rollout.packed_step)


def walk(recipe: Recipe, setup: Setup, automaton: Automaton, tokenizer, judge: Judge, nodes: int) -> list[Call]:
    """The programs of a step. Beside what the step makes the chips hold state, reference, bank, and the batch of the next step."""
    optimizer = make_optimizer(recipe.grpo.optimizer, 1)
    programs = Walked(recipe, setup, optimizer, automaton, tokenizer, judge)
    loaded = lambda: programs.loaded(nodes, len(automaton.ids))  # noqa: E731
    state, reference = (programs.as_placed(x) for x in (setup.abstract_state(optimizer), setup.abstract_reference()))
    upcoming, bank = loaded(), programs.everywhere(judge.bank)
    grpo_step(programs, bank, recipe, state, reference, 0, loaded(), lambda phase, outputs: None)
    del upcoming
    return list(programs.calls.values())
