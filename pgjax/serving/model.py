"""A trained model as one object: chats in, its own next turns out. The engine behind it answers many at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.config import Recipe
from pgjax.conversation import chat_text
from pgjax.data.arrays import Prompt, prompt_batch
from pgjax.data.images import shrunk
from pgjax.generate.law import Law
from pgjax.serving.engine import Ask, Engine
from pgjax.tokenizer import never_sampled
from pgjax.train.materials import cache_dir
from pgjax.train.saved import SavedRun, is_checkpoint, open_checkpoint, open_run


class Started(NamedTuple):
    recipe: Recipe
    tokenizer: Any
    automaton: Automaton  # numpy
    engine: Engine


@dataclass(frozen=True)
class Model:
    """Use it as a context manager, or call `close`: the engine is a thread."""

    recipe: Recipe
    tokenizer: Any
    automaton: Automaton  # numpy
    engine: Engine

    @classmethod
    def load(cls, folder: Path, best: bool = False, *, rows: int = 8, queue: int = 64, prompt_tokens: int | None = None) -> Self:
        """The newest checkpoint of a run folder or its `best`, or a Hugging Face checkpoint directory, on all devices.

        `rows` answers at a time on each device that shares the batch, `queue` requests may wait. `prompt_tokens` stands instead of the
        recipe's data.prompt_tokens; a model has not seen longer prompts in training.
        """
        check_room(rows, queue, prompt_tokens)
        return cls(*start(open_saved(folder, best), rows, queue, prompt_tokens, ids=("C1",)))

    def close(self) -> None:
        self.engine.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def chat(self, messages: list[dict], images: Sequence[bytes], **how: Any) -> Ask:
        """An ask for the model's own next turn in a chat (`messages` as for chat templates), without a policy of ours or the automaton.
        `how` are fields of `Ask`. ValueError for what does not fit."""
        prompt = Prompt(0, chat_text(messages, self.tokenizer), images)
        vision, data = self.recipe.model.vision, self.recipe.data
        batch = prompt_batch([prompt], self.tokenizer, vision, self.engine.prompt_tokens, data.patches)
        return Ask(batch, int(self.automaton.start_M[0]), np.ones(len(self.automaton.ids) + 2, bool), bound=False, **how)

    def shrunk(self, images: Sequence[bytes]) -> tuple[bytes, ...]:
        """The pictures, those smaller that take more patches than each one's share. ValueError for one that cannot be read."""
        share = self.recipe.data.patches // max(len(images), 1)
        return tuple(shrunk(image, self.recipe.model.vision, share) for image in images)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


def check_room(rows: int, queue: int, prompt_tokens: int | None) -> None:
    for name, number in {"rows": rows, "queue": queue, "prompt tokens": prompt_tokens}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} {number} must be 1 or more")


def open_saved(folder: Path, best: bool = False) -> SavedRun:
    return open_checkpoint(folder) if is_checkpoint(folder) else open_run(folder, best)


def start(saved: SavedRun, rows: int, queue: int, prompt_tokens: int | None, ids: tuple[str, ...], opening: str = "") -> Started:
    """An engine for the model. `ids` are those that answers under the automaton may name; prompts may have `opening` behind them."""
    recipe, setup, params, tokenizer = saved
    recipe = replace(recipe, data=replace(recipe.data, prompt_tokens=prompt_tokens or recipe.data.prompt_tokens))
    vocab, limit = recipe.model.text.vocab, recipe.answer.max_tokens
    with jax.set_mesh(setup.mesh):
        weights = jax.jit(setup.cast, out_shardings=setup.rollout)(params)
        automaton = answers.build(tokenizer, ids, recipe.answer.think_tag, vocab, cache_dir())
        law = Law(jax.numpy.asarray(never_sampled(tokenizer, vocab)), automaton, None, limit)
    T = recipe.data.prompt_tokens + len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    engine = Engine(setup, weights, law, T, recipe.data.patches, rows, queue)
    return Started(recipe, tokenizer, jax.tree.map(np.asarray, automaton), engine)
