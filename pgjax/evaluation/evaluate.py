"""Greedy answers to a held-out split, and what is scored of them."""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Verdict
from pgjax.bank import Bank, build_bank
from pgjax.data.pipeline import Batch, Pipeline
from pgjax.data.schema import CATEGORY_OOD, TEXT_IMAGE
from pgjax.evaluation.metrics import Rows, mean_similarity
from pgjax.evaluation.naming import nearness, ranks
from pgjax.generate.labels import label_probabilities
from pgjax.models.static_encoder import load_static_encoder
from pgjax.parallel.mesh import gather_rows, local_rows, place_rows
from pgjax.taxonomy import Taxonomy
from pgjax.tokenizer import answer_texts


class Answered(NamedTuple):
    """One batch with its greedy answers; arrays are numpy, this process's rows."""

    batch: Batch
    length_P: np.ndarray  # tokens
    verdict: Verdict  # [P]
    reward_P: np.ndarray
    terms: dict[str, np.ndarray]  # of the reward, [P] each
    texts: list[str]  # the answers, [P]
    scores: dict[str, np.ndarray]  # probability of unsafe on the lines "request" and "response", [P] each
    naming: dict[str, np.ndarray]  # by measure, [P] each: how near the name comes to the gold node; NaN where nothing can be near


def answer(programs, weights: dict, pipeline: Pipeline, bank: Bank, prompts: int) -> Iterator[Answered]:
    """Answers batch by batch. `weights` are the rollout's, `programs` those of grpo/programs.py, `bank` holds never-seen nodes too."""
    tokenizer, limit, taxonomy = programs.tokenizer, programs.recipe.answer.max_tokens, pipeline.taxonomy
    second = load_static_encoder()
    second_bank = build_bank(taxonomy, second, without_phrases(bank, taxonomy)) if second else None
    for k in range(pipeline.batches(prompts)):
        batch = pipeline.batch(k, prompts)
        prompt, gold = place_rows((batch.prompt, batch.gold), programs.mesh)
        rollout, _ = programs.rollout(weights, prompt, gold, group=1, greedy=True)
        judged = programs.judge(rollout, gold, bank)
        verdict, reward_P, terms = jax.tree.map(lambda x: local_rows(x)[:, 0], (judged.verdict, judged.reward_PG, judged.terms))
        naming = {"naming": mean_similarity(local_rows(judged.similarity_PGS)[:, 0], local_rows(judged.valid_PS))}
        rollout = jax.tree.map(local_rows, rollout)
        texts = answer_texts(tokenizer, rollout.tokens_PGR, rollout.length_PG)
        named_P = np.asarray(verdict.parsed & (verdict.kind == answers.NAME) & (batch.gold.category_P == CATEGORY_OOD))
        names = [answers.category_text(text) if named else None for text, named in zip(texts, named_P, strict=True)]
        near = partial(nearness, names, batch.gold.accepted_PN.astype(bool), batch.gold.modality_P == TEXT_IMAGE, taxonomy)
        naming |= ranks(near(programs.embedder, bank))
        if second:
            naming["naming_second"] = near(second, second_bank).mean_P
        scores = label_probabilities(programs.score_given, weights, batch.prompt, texts, tokenizer, limit)
        yield Answered(
            batch, rollout.length_PG[:, 0], verdict, reward_P, terms, texts, {line.lower(): s for line, s in scores.items()}, naming
        )


def without_phrases(bank: Bank, taxonomy: Taxonomy) -> list[str]:
    """Ids that the bank has no phrases of."""
    return [node.id for node, valid_S in zip(taxonomy.nodes, np.asarray(bank.valid_NS), strict=True) if not valid_S.any()]


def evaluate(programs, weights: dict, pipeline: Pipeline, bank: Bank, prompts: int, seen: Callable[[Answered], None]) -> Rows:
    """The whole split's rows, of all processes, for evaluation/metrics.py; `seen` gets each batch, for samples and progress.

    `naming` has the mean similarity by the reward's embedder, the rank of the gold node by it (`naming_mrr`, `naming_top1`;
    evaluation/naming.py), and the similarity by another embedder where one is installed (`naming_second`).
    """
    batches = []
    for answered in answer(programs, weights, pipeline, bank, prompts):
        seen(answered)
        batches.append((answered.verdict, answered.batch.gold, _groups(answered), answered.scores, answered.naming))
    return gather_rows(Rows(*jax.tree.map(lambda *x: np.concatenate(x), *batches)), programs.mesh)


def _groups(answered: Answered) -> np.ndarray:
    """The rows' groups as numbers that every process gives alike; 0 for rows that only pad."""
    codes = [zlib.crc32(example.group.encode()) for example, _ in answered.batch.rows]
    return np.array(codes + [0] * (len(answered.texts) - len(codes)), np.uint32)
