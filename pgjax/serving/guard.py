"""A trained guard as one object: a conversation in, a verdict out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.config import OODConfig, Recipe
from pgjax.data.pipeline import Batch, Renderer
from pgjax.data.schema import LABELS, Example
from pgjax.generate.decode import Rollout, decode, encode, prefill
from pgjax.generate.labels import Scorer, answer_scorer, label_probability
from pgjax.generate.law import Law
from pgjax.parallel.mesh import place_rows
from pgjax.taxonomy import Taxonomy, full_view, load_taxonomy
from pgjax.tokenizer import answer_texts, never_sampled
from pgjax.train.materials import cache_dir, grid
from pgjax.train.run_folder import read_config
from pgjax.train.saved import open_run
from pgjax.train.setup import Setup

ROWS = 8  # conversations in a batch; a lone one is a batch of its own
NAME_LIMIT, REASONING_LIMIT = 80, 2000  # characters that are shown


@dataclass(frozen=True)
class Guard:
    recipe: Recipe
    setup: Setup
    weights: dict
    tokenizer: Any
    taxonomy: Taxonomy
    automaton: Automaton

    @classmethod
    def load(cls, run: Path, policy: Path | None = None, best: bool = False) -> "Guard":
        """The newest checkpoint of a run folder, or the `best` (grpo.keep_best). `policy` is a taxonomy file of the user's own."""
        taxonomy = load_taxonomy(policy or read_config(run).data.taxonomy)
        recipe, setup, params, tokenizer = open_run(run, best)
        with jax.set_mesh(setup.mesh):
            weights = jax.jit(setup.cast, out_shardings=setup.rollout)(params)
        automaton = answers.build(tokenizer, grid(taxonomy), recipe.answer.think_tag, recipe.model.text.vocab, cache_dir())
        return cls(recipe, setup, weights, tokenizer, taxonomy, automaton)

    def moderate(self, examples: Sequence[Example], categories: Sequence[str] = ()) -> list[dict]:
        """One verdict per conversation, in order; greedy and under the automaton, so that every answer ends and parses.

        `categories` names the taxonomy ids that the prompt's policy lists; none means all. Keys: request, response (as the answer labels
        them: safe, unsafe; null for the response to an image alone), category_id (of the policy, or null), category_name, in_policy
        (null where all is safe), reasoning, scores {request, response} (probability of unsafe, not calibrated; null where there is no
        such line), parsed, not_a_guard. Raises ValueError for a conversation that cannot be shown whole, before any is answered.
        """
        return list(self.verdicts(examples, categories))

    def verdicts(self, examples: Sequence[Example], categories: Sequence[str] = ()) -> Iterator[dict]:
        """As `moderate`, each batch when it is done. All conversations are checked before this returns."""
        renderer = self._renderer(tuple(categories))
        data = self.recipe.data
        reasons = {
            "prompt": f"with this policy the prompt has more than the {data.prompt_tokens} tokens of the model; "
            "list fewer categories or shorten the conversation",
            "patches": f"the images take more than the {data.patches} patches of the model; give smaller ones",
            "image": "the image cannot be read",
        }
        for example in examples:
            if reason := renderer.unfit(example):
                raise ValueError(f"{example.id}: {reasons[reason]}")
        rows = 1 if len(examples) == 1 else ROWS
        return (verdict for i in range(0, len(examples), rows) for verdict in self._answer(renderer.show(examples[i : i + rows], rows)))

    @cached_property
    def _renderer(self) -> Callable[[tuple[str, ...]], Renderer]:
        """Conversations beside a policy of these categories, as arrays; the last few are kept."""

        def make(categories: tuple[str, ...]) -> Renderer:
            listed = {leaf.id for id in categories for leaf in self.taxonomy.children(id) or (self.taxonomy.by_id(id),)}
            hidden = tuple(leaf.id for leaf in self.taxonomy.leaves if listed and leaf.id not in listed)
            if not full_view(self.taxonomy, "leaf", hidden).entries:
                raise ValueError("no category is left to list; --categories names reserved ones alone")
            recipe = dataclasses.replace(self.recipe, data=dataclasses.replace(self.recipe.data, ood=OODConfig(never_seen=hidden)))
            return Renderer(self.taxonomy, self.tokenizer, recipe, self.automaton.ids)

        return functools.lru_cache(16)(make)

    @cached_property
    def _programs(self) -> tuple[Callable[..., Rollout], Scorer]:
        """The answering program (weights, prompt, gold) and the scoring one; each compiles once for a number of rows."""
        model, config, mesh = self.setup.model, self.recipe, self.setup.mesh
        blocked_V = jnp.asarray(never_sampled(self.tokenizer, config.model.text.vocab))

        def law(outcome_PJ: jax.Array, constrained: bool) -> Law:
            return Law(blocked_V, self.automaton, outcome_PJ, config.answer.max_tokens, constrained=constrained)

        @jax.jit
        def answer(weights, prompt, gold) -> Rollout:
            law_P = law(answers.outcome_mask(self.automaton, gold.node_of_id_PK), True)
            start = prefill(model, weights, prompt, encode(model, weights, prompt))
            args = gold.modality_P, start, law_P, jax.random.key(0), jnp.int32(0)
            return decode(model, weights, prompt, *args, group=1, greedy=True)[0]

        return answer, answer_scorer(model, law(None, False), mesh)

    def _answer(self, batch: Batch) -> list[dict]:
        """Verdicts of a batch's real rows."""
        answer, scorer = self._programs
        with jax.set_mesh(self.setup.mesh):
            rollout = jax.tree.map(np.asarray, answer(self.weights, *place_rows((batch.prompt, batch.gold), self.setup.mesh)))
        texts = answer_texts(self.tokenizer, rollout.tokens_PGR, rollout.length_PG)
        limit = self.recipe.answer.max_tokens
        scores = {
            line.lower(): label_probability(scorer, self.weights, batch.prompt, texts, line, self.tokenizer, limit)
            for line in ("Request", "Response")
        }
        verdict = jax.tree.map(lambda x: np.asarray(x)[:, 0], answers.verdict(self.automaton, rollout.final_PG))
        return [self._describe(p, texts[p], verdict, np.asarray(batch.gold.node_of_id_PK), scores) for p in range(len(batch.rows))]

    def _describe(self, p: int, text: str, verdict: answers.Verdict, node_of_id_PK: np.ndarray, scores: dict[str, np.ndarray]) -> dict:
        label = lambda code: LABELS[code] if LABELS[code] in ("safe", "unsafe") else None  # noqa: E731
        kind, id = int(verdict.kind[p]), int(verdict.id[p])
        node = int(node_of_id_PK[p, id]) if kind == answers.ID else -1
        name = answers.category_text(text) if kind == answers.NAME else None
        think = text.partition(f"<{self.recipe.answer.think_tag}>")[2].partition(f"</{self.recipe.answer.think_tag}>")[0]
        return {
            "request": label(verdict.request[p]),
            "response": label(verdict.response[p]),
            "category_id": self.automaton.ids[id] if kind == answers.ID else None,
            "category_name": self.taxonomy.nodes[node].name if node >= 0 else printable(name, NAME_LIMIT) if name else None,
            "in_policy": node >= 0 if kind in (answers.ID, answers.NAME) else None,
            "reasoning": printable(think, REASONING_LIMIT),
            "scores": {line: None if np.isnan(score_P[p]) else round(float(score_P[p]), 6) for line, score_P in scores.items()},
            "parsed": bool(verdict.parsed[p]),
            "not_a_guard": self.recipe.not_a_guard,
        }


def printable(text: str, limit: int) -> str:
    """What a guard writes is untrusted: one line, printable characters, bounded."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:limit]
