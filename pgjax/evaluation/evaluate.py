"""Greedy answers to a held-out split, and what is scored of them."""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from pgjax import automaton as answers
from pgjax.automaton import Verdict
from pgjax.bank import Bank, build_bank
from pgjax.data.pipeline import Batch, Pipeline
from pgjax.data.schema import CATEGORY_OOD, TEXT_IMAGE
from pgjax.evaluation.metrics import Rows, mean_similarity
from pgjax.evaluation.naming import nearness, ranks
from pgjax.generate.labels import label_probability
from pgjax.models.static_encoder import load_static_encoder
from pgjax.parallel.mesh import local_rows, place_rows
from pgjax.tokenizer import answer_texts


class Answered(NamedTuple):
    """One batch with its greedy answers; arrays are numpy, this process's rows."""

    batch: Batch
    length_P: np.ndarray  # tokens
    verdict: Verdict  # [P]
    similarity_P: np.ndarray
    reward_P: np.ndarray
    terms: dict[str, np.ndarray]  # of the reward, [P] each
    texts: list[str]  # the answers, [P]
    scores: dict[str, np.ndarray]  # probability of unsafe on the lines "request" and "response", [P] each; empty when not asked for


def answer(programs, weights: dict, pipeline: Pipeline, bank: Bank, prompts: int, scored: bool) -> Iterator[Answered]:
    """Answers batch by batch. `weights` are the rollout's, `programs` those of grpo/programs.py; `scored` adds the label scores."""
    tokenizer, limit = programs.tokenizer, programs.recipe.answer.max_tokens
    for k in range(pipeline.batches(prompts)):
        batch = pipeline.batch(k, prompts)
        prompt, gold = place_rows((batch.prompt, batch.gold), programs.mesh)
        rollout, _ = programs.rollout(weights, prompt, gold, group=1, greedy=True)
        judged = programs.judge(rollout, gold, bank)
        similarity_P = mean_similarity(local_rows(judged.similarity_PGS)[:, 0], local_rows(judged.valid_PS))
        verdict, reward_P, terms = jax.tree.map(lambda x: local_rows(x)[:, 0], (judged.verdict, judged.reward_PG, judged.terms))
        rollout = jax.tree.map(local_rows, rollout)
        texts = answer_texts(tokenizer, rollout.tokens_PGR, rollout.length_PG)
        scores = {
            line.lower(): label_probability(programs.score_given, weights, batch.prompt, texts, line, tokenizer, limit)
            for line in (("Request", "Response") if scored else ())
        }
        yield Answered(batch, rollout.length_PG[:, 0], verdict, similarity_P, reward_P, terms, texts, scores)


def evaluate(
    programs, weights: dict, pipeline: Pipeline, bank: Bank, prompts: int, seen: Callable[[Answered], None], full: bool = False
) -> Rows:
    """The whole split's rows, of all processes, for evaluation/metrics.py; `seen` gets each batch, for samples and progress.

    `bank` holds never-seen nodes too. `full` adds what costs more: label scores (AUROC), the rank of the gold node by the reward's embedder
    (`naming_mrr`, `naming_top1`; evaluation/naming.py), and the similarity by another embedder where one is installed (`naming_second`).
    """
    batches = []
    for answered in answer(programs, weights, pipeline, bank, prompts, full):
        seen(answered)
        batches.append(answered)
    join = lambda trees: jax.tree.map(lambda *x: np.concatenate(x), *trees)  # noqa: E731
    verdict, gold, scores = join([(b.verdict, b.batch.gold, b.scores) for b in batches])
    naming = {"naming": np.concatenate([b.similarity_P for b in batches])}
    if full:
        named_P = np.asarray(verdict.parsed & (verdict.kind == answers.NAME) & (gold.category_P == CATEGORY_OOD))
        texts = [text for b in batches for text in b.texts]
        names = [answers.category_text(text) if named else None for text, named in zip(texts, named_P, strict=True)]
        judge = partial(nearness, names, gold.accepted_PN.astype(bool), gold.modality_P == TEXT_IMAGE, pipeline.taxonomy)
        naming |= ranks(judge(programs.embedder, bank))
        if second := load_static_encoder():
            valid_NS = np.asarray(bank.valid_NS)
            without = [node.id for node, valid_S in zip(pipeline.taxonomy.nodes, valid_NS, strict=True) if not valid_S.any()]
            naming["naming_second"] = judge(second, build_bank(pipeline.taxonomy, second, without)).mean_P
    group_P = np.concatenate([_groups(b.batch, len(b.texts)) for b in batches])
    return process_allgather(Rows(verdict, gold, group_P, scores, naming), tiled=True)


def _groups(batch: Batch, P: int) -> np.ndarray:
    """The rows' groups as numbers that every process gives alike; 0 for rows that only pad."""
    codes = [zlib.crc32(example.group.encode()) for example, _ in batch.rows]
    return np.array(codes + [0] * (P - len(codes)), np.uint32)
