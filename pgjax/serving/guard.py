"""A trained guard as one object: a conversation and a policy in, a verdict out. The engine behind it answers many at once."""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import id_grid
from pgjax.config import OODConfig, Recipe
from pgjax.data.arrays import TooLong
from pgjax.data.pipeline import Renderer
from pgjax.data.schema import MODALITIES, Example, Modality
from pgjax.serving.calibration import Calibration, read_calibration
from pgjax.serving.engine import Ask, Told
from pgjax.serving.model import Model, check_room, open_saved, start
from pgjax.serving.scores import forks
from pgjax.serving.scores import read as read_scores
from pgjax.serving.verdict import read, verdict
from pgjax.taxonomy import PolicyView, Taxonomy, full_view, level_of, load_taxonomy, node_of_id, parse_taxonomy
from pgjax.train.materials import grid

CATEGORIES, SUBCATEGORIES = 24, 4  # that a policy may have, at least: more ids make larger tables, and other programs

Mode = Literal["think", "fast"]


@dataclass(frozen=True)
class How:
    """How a conversation is judged."""

    mode: Mode = "think"  # fast: the reasoning is empty
    samples: int = 1  # 1: greedy; more: a vote of drawn answers, their scores averaged
    threshold: float | None = None  # on the larger score of the two; None: the calibrated one, and without one the labels decide
    fail_open: bool = False  # what an answer that does not parse means; closed: flagged
    categories: bool = True  # score every listed category too
    seed: int = 0
    deadline: float | None = None  # time.monotonic()

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} must be 0 to 1")
        if self.samples < 1:
            raise ValueError(f"samples {self.samples} must be 1 or more")


@dataclass(frozen=True)
class Policy:
    """What a prompt lists, compiled: a taxonomy, and which of its ids are withheld."""

    taxonomy: Taxonomy
    hidden: tuple[str, ...]
    renderer: Renderer

    def view(self, modality: Modality) -> PolicyView:
        return full_view(self.taxonomy, level_of(modality), self.hidden)


class Unfit(ValueError):
    """A conversation that cannot be shown whole; `reason` in a few words."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Case(NamedTuple):
    """A conversation on its way through the engine."""

    example: Example
    policy: Policy
    how: How
    node_of_id_K: np.ndarray
    future: "Future[list[Told]]"


@dataclass(frozen=True)
class Guard(Model):
    """Use it as a context manager, or call `close`: the engine is a thread."""

    taxonomy: Taxonomy
    calibration: Calibration | None
    bound: bool  # answers under the automaton

    @classmethod
    def load(
        cls,
        folder: Path,
        best: bool = False,
        *,
        rows: int = 8,
        queue: int = 64,
        bound: bool = True,
        calibrated: bool = True,
        prompt_tokens: int | None = None,
    ) -> "Guard":
        """As `Model.load`. `bound` off: nothing holds answers to the format. `calibrated` off: scores as they come. ValueError for a
        calibration beside the model that belongs to another checkpoint.
        """
        check_room(rows, queue, prompt_tokens)
        calibration = read_calibration(folder, best) if calibrated else None
        saved = open_saved(folder, best)
        if saved.recipe.data.name == "rewriter":
            raise ValueError(f"{folder} is a rewriter's run, and no guard: `pgjax rewrite` and `serve --rewriter` take it")
        taxonomy, opening = load_taxonomy(saved.recipe.data.taxonomy), _opening(saved.recipe)
        return cls(*start(saved, rows, queue, prompt_tokens, _ids(taxonomy), opening), taxonomy, calibration, bound)

    # --- policies --------------------------------------------------------------------------------------------------------------------

    def policy(self, categories: Sequence[str] = (), own: str | None = None) -> Policy:
        """A policy of these ids of the guard's taxonomy (none means all), or of the user's `own`: YAML or JSON, a list of categories or
        of names. The last ones asked for are kept. ValueError for what cannot be one."""
        return self._policies(tuple(categories), own)

    @cached_property
    def _policies(self) -> Callable[[tuple[str, ...], str | None], Policy]:
        return functools.lru_cache(64)(self._compile)

    def _compile(self, categories: tuple[str, ...], own: str | None) -> Policy:
        taxonomy = self.taxonomy if own is None else parse_taxonomy(own, "policy", brief=True)
        if lacking := sorted(set(grid(taxonomy)) - set(self.automaton.ids)):
            raise ValueError(f"the policy needs the id {lacking[0]}; this guard takes {CATEGORIES} categories of {SUBCATEGORIES}")
        listed = {leaf.id for id in categories for leaf in taxonomy.children(id) or (taxonomy.by_id(id),)}
        hidden = tuple(leaf.id for leaf in taxonomy.leaves if listed and leaf.id not in listed)
        if not full_view(taxonomy, "leaf", hidden).entries:
            raise ValueError("no category is left to list; --categories names reserved ones alone")
        recipe = dataclasses.replace(self.recipe, data=dataclasses.replace(self.recipe.data, ood=OODConfig(never_seen=hidden)))
        return Policy(taxonomy, hidden, Renderer(taxonomy, self.tokenizer, recipe, self.automaton.ids))

    # --- conversations ---------------------------------------------------------------------------------------------------------------

    def ask(self, example: Example, policy: Policy, how: How = How(), view: PolicyView | None = None) -> tuple[Ask, np.ndarray]:
        """What the engine is asked, and which node each id stands for. `view` is what the prompt shows; None is the whole policy. Pictures
        that take more patches than the model's share for each are made smaller. Unfit where a conversation cannot be shown whole."""
        view = view or policy.view(example.modality)
        opening, data, where = self.opening(how.mode), self.recipe.data, example.id
        if policy.renderer.reserved & {example.node, *example.accepted}:
            raise Unfit("reserved", f"{where}: it is about a category that no prompt may show")
        try:
            images = self.shrunk(example.images)
        except ValueError as error:
            raise Unfit("image not readable", f"{where}: image: {error}") from error
        try:
            prompt = policy.renderer.prompt(dataclasses.replace(example, images=images), view, opening, self.engine.prompt_tokens)
        except TooLong as error:
            if error.slots > data.patches:
                raise Unfit(
                    "images too large", f"{where}: the images take more than the {data.patches} patches of the model; give fewer"
                ) from None
            what = f"with this policy the prompt has more than the {data.prompt_tokens} tokens of the model"
            raise Unfit("prompt too long", f"{where}: {what}; list fewer categories or shorten the conversation") from None
        node_of_id_K = node_of_id(view, self.automaton.ids)
        start = int(self.automaton.start_M[MODALITIES.index(example.modality)])
        start = answers.walk(self.automaton, start, self.encode([opening])[0])
        ids = [id for id, _ in view.entries if id in view.answerable] if how.categories else []
        has_response = example.modality != "image"
        ask = Ask(
            prompt,
            start,
            np.append(node_of_id_K >= 0, [True, True]),
            self.recipe.answer.max_tokens,
            how.samples,
            1.0 if how.samples > 1 else 0.0,
            how.seed,
            self.bound,
            how.deadline,
            lambda tokens: forks(opening, tokens, self.text, self.encode, ids, has_response),
        )
        needed = int(self.automaton.distance_AJ[ask.start][ask.outcome_J].min() + self.automaton.reserve_A[ask.start])
        if ask.bound and needed > ask.limit:
            raise Unfit(
                "answer too short", f"{example.id}: an answer takes at least {needed} tokens; this guard writes at most {ask.limit}"
            )
        return ask, node_of_id_K

    def submit(self, example: Example, policy: Policy, how: How = How(), view: PolicyView | None = None, wait: bool = False) -> Case:
        """Into the engine's queue; `wait` while it is full, else raise Full. Unfit as `ask`."""
        ask, node_of_id_K = self.ask(example, policy, how, view)
        return Case(example, policy, how, node_of_id_K, self.engine.submit(ask, wait))

    def judge(
        self, rows: Iterable[tuple[Example, PolicyView | None] | ValueError], policy: Policy, how: How = How()
    ) -> Iterator[Case | ValueError]:
        """Every row's case when it has its answers, in order, or why it cannot be judged (Unfit, or the error that stands in the row's
        place); a few are on their way at a time, and no more rows than those are read."""
        flight: deque[Case | ValueError] = deque()
        for row in rows:
            try:
                flight.append(row if isinstance(row, ValueError) else self.submit(row[0], policy, how, row[1], wait=True))
            except Unfit as error:
                flight.append(error)
            if len(flight) >= 2 * self.engine.rows:
                yield _answered(flight.popleft())
        yield from map(_answered, flight)

    def verdict(self, case: Case) -> dict:
        """What `serving/verdict.py` says of the case's answers, when they are there, with `mode`, `samples` and `not_a_guard`."""
        how, opening = case.how, self.opening(case.how.mode)
        tag = self.recipe.answer.think_tag
        readings = [
            read(opening + self.text(told.tokens), told.state, self.automaton, case.node_of_id_K, tag, read_scores(told.scores))
            for told in case.future.result()
        ]
        calibration = self.calibration
        if calibration and (calibration.mode, calibration.samples) != (how.mode, how.samples):
            calibration = None
        threshold = how.threshold if how.threshold is not None else calibration.threshold if calibration else None
        said = verdict(readings, case.policy.taxonomy, threshold, how.fail_open, calibration)
        return said | {"mode": how.mode, "samples": how.samples, "not_a_guard": self.recipe.not_a_guard}

    def verdicts(self, examples: Sequence[Example], policy: Policy, how: How = How()) -> Iterator[dict]:
        """A verdict for each conversation, in order, as they come. Unfit as `ask`, before any is answered."""
        for example in examples:
            self.ask(example, policy, how)
        for case in self.judge(((example, None) for example in examples), policy, how):
            if isinstance(case, ValueError):
                raise case
            yield self.verdict(case)

    def opening(self, mode: Mode) -> str:
        """What an answer begins with before the model writes."""
        return _opening(self.recipe) if mode == "fast" else ""


def _answered(case: Case | ValueError) -> Case | ValueError:
    if isinstance(case, Case):
        case.future.result()
    return case


def _opening(recipe: Recipe) -> str:
    """What an answer in mode `fast` begins with."""
    return f"<{recipe.answer.think_tag}></{recipe.answer.think_tag}>\n<answer>\n"


def _ids(taxonomy: Taxonomy) -> tuple[str, ...]:
    """The ids of the taxonomy, and of any policy of CATEGORIES times SUBCATEGORIES."""
    most = max(len(taxonomy.children(node.id)) for node in taxonomy.top)
    return id_grid(max(len(taxonomy.top), CATEGORIES), max(most, SUBCATEGORIES))
