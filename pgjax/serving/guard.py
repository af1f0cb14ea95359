"""A trained guard as one object: a conversation in, a verdict out."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.config import OODConfig, Recipe
from pgjax.data.pipeline import Pipeline
from pgjax.data.schema import LABELS, Example
from pgjax.generate.decode import decode, encode, prefill
from pgjax.generate.law import Law
from pgjax.grpo.programs import never_sampled
from pgjax.parallel.mesh import make_mesh
from pgjax.taxonomy import Taxonomy, load_taxonomy
from pgjax.train.checkpoints import Checkpoints
from pgjax.train.materials import cache_dir, grid
from pgjax.train.run_folder import read_config
from pgjax.train.setup import Setup, make_setup
from pgjax.train.update import make_optimizer

NAME_LIMIT = 80  # characters of a free name that are shown


@dataclass(frozen=True)
class Guard:
    recipe: Recipe
    setup: Setup
    weights: dict
    tokenizer: object
    taxonomy: Taxonomy
    automaton: Automaton

    @classmethod
    def load(cls, run: Path, policy: Path | None = None) -> "Guard":
        """The newest checkpoint of a run folder. `policy` is a taxonomy file of the user's own."""
        recipe = read_config(run)
        taxonomy = load_taxonomy(policy or recipe.data.taxonomy)
        tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
        setup = make_setup(recipe.model, make_mesh(recipe.mesh))
        checkpoints = Checkpoints(run / "checkpoints", recipe.grpo.keep_checkpoints)
        updates = recipe.grpo.steps * (recipe.grpo.prompts // recipe.grpo.mini_prompts)
        state = checkpoints.restore(setup.abstract_state(make_optimizer(recipe.grpo.optimizer, updates)))
        checkpoints.close()
        with jax.set_mesh(setup.mesh):
            weights = jax.jit(setup.cast, out_shardings=setup.rollout)(state.params)
        automaton = answers.build(tokenizer, grid(taxonomy), recipe.answer.think_tag, recipe.model.text.vocab, cache_dir())
        return cls(recipe, setup, weights, tokenizer, taxonomy, automaton)

    def moderate(self, examples: list[Example], categories: Sequence[str] = ()) -> list[dict]:
        """One verdict per conversation, greedy and under the automaton, so that every answer ends and parses.

        `categories` names the taxonomy ids that the prompt's policy lists; none means all. Keys: request, response (safe, unsafe or
        null), category_id (of the policy, or null), category_name, in_policy, reasoning, parsed, not_a_guard. Raises ValueError for a
        conversation that does not fit the recipe's prompt (too long, unreadable image).
        """
        listed = {leaf.id for id in categories for leaf in self.taxonomy.children(id) or (self.taxonomy.by_id(id),)}
        hidden = tuple(leaf.id for leaf in self.taxonomy.leaves if listed and leaf.id not in listed)
        ood = OODConfig(share=0.0, shuffle=False, never_seen=hidden)
        recipe = dataclasses.replace(self.recipe, data=dataclasses.replace(self.recipe.data, ood=ood))
        pipeline = Pipeline(examples, self.taxonomy, self.tokenizer, recipe, examples[0].split, self.automaton.ids)
        if pipeline.dropped:
            raise ValueError(f"inputs do not fit this model's prompt: {dict(pipeline.dropped)}; list fewer categories or shorten the input")
        batch = pipeline.batch(0, len(examples))
        model, blocked_V = self.setup.model, jnp.asarray(never_sampled(self.tokenizer, self.recipe.model.text.vocab))

        def run(weights, prompt, gold):
            outcome_PJ = answers.outcome_mask(self.automaton, gold.node_of_id_PK)
            law = Law(blocked_V, self.automaton, outcome_PJ, self.recipe.answer.max_tokens, constrained=True)
            start = prefill(model, weights, prompt, encode(model, weights, prompt))
            return decode(model, weights, prompt, gold.modality_P, start, law, jax.random.key(0), jnp.int32(0), group=1, greedy=True)

        with jax.set_mesh(self.setup.mesh):
            rollout = jax.tree.map(np.asarray, jax.jit(run)(self.weights, batch.prompt, batch.gold))
        verdict = jax.tree.map(np.asarray, answers.verdict(self.automaton, rollout.final_PG))
        return [self._describe(p, batch.gold, rollout, verdict) for p in range(len(examples))]

    def _describe(self, p: int, gold, rollout, verdict) -> dict:
        text = self.tokenizer.decode(rollout.tokens_PGR[p, 0, : rollout.length_PG[p, 0]], skip_special_tokens=True)
        label = lambda code: LABELS[code] if LABELS[code] in ("safe", "unsafe") else None  # noqa: E731
        kind, id = int(verdict.kind[p, 0]), int(verdict.id[p, 0])
        shown = self.automaton.ids[id] if kind == answers.ID else None
        node = int(gold.node_of_id_PK[p, id]) if shown else -1
        name = answers.category_text(text) if kind == answers.NAME else None
        think = text.partition(f"<{self.recipe.answer.think_tag}>")[2].partition(f"</{self.recipe.answer.think_tag}>")[0]
        return {
            "request": label(int(verdict.request[p, 0])),
            "response": label(int(verdict.response[p, 0])),
            "category_id": shown,
            "category_name": self.taxonomy.nodes[node].name if node >= 0 else printable(name, NAME_LIMIT) if name else None,
            "in_policy": node >= 0 if kind != answers.NONE else None,
            "reasoning": printable(think, 2000),
            "parsed": bool(verdict.parsed[p, 0]),
            "not_a_guard": self.recipe.not_a_guard,
        }


def printable(text: str, limit: int) -> str:
    """What a guard writes is untrusted: one line, printable characters, bounded."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:limit]


def conversation(request: str | None, response: str | None, image: bytes | None, id: str = "input") -> Example:
    """An unlabelled conversation; which modality it is follows from what is there. ValueError when nothing is."""
    if request is None and image is None:
        raise ValueError("nothing to moderate: give --request, --image or both (a --response alone needs the request it answers)")
    if request is None and response is not None:
        raise ValueError("a response to an image without a request cannot be judged: give --request too")
    modality = "text" if image is None else "image" if request is None else "text_image"
    return Example(
        id=id,
        group=id,
        source="input",
        modality=modality,
        request=request,
        response=response,
        images=() if image is None else (image,),
        request_label="unknown",
        response_label="unknown" if response is not None else "absent",
        category="unknown",
        split="input",
    )
