"""Greedy answers to a held-out split, and their scores."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgjax.automaton import Verdict
from pgjax.bank import Bank
from pgjax.data.pipeline import Batch, Pipeline
from pgjax.data.schema import Gold
from pgjax.evaluation.metrics import Scores, mean_similarity, summarise
from pgjax.generate.decode import Rollout
from pgjax.parallel.mesh import local_rows, place_rows


class Answered(NamedTuple):
    """One batch with its greedy answers; arrays are numpy, this process's rows."""

    batch: Batch
    rollout: Rollout  # G = 1
    verdict: Verdict  # [P]
    similarity_P: np.ndarray


def answer(programs, weights: dict, pipeline: Pipeline, bank: Bank, prompts: int) -> Iterator[Answered]:
    """Answers batch by batch. `weights` are the rollout's, `programs` those of grpo/programs.py."""
    for k in range(pipeline.batches(prompts)):
        batch = pipeline.batch(k, prompts)
        prompt, gold = place_rows((batch.prompt, batch.gold), programs.mesh)
        rollout = programs.rollout(weights, prompt, gold, jnp.int32(0), group=1, greedy=True)
        judged = programs.judge(rollout, gold, bank)
        similarity_P = mean_similarity(local_rows(judged.similarity_PGS)[:, 0], local_rows(judged.valid_PS))
        verdict = jax.tree.map(lambda x: local_rows(x)[:, 0], judged.verdict)
        yield Answered(batch, jax.tree.map(local_rows, rollout), verdict, similarity_P)


def evaluate(programs, weights: dict, pipeline: Pipeline, bank: Bank, prompts: int, seen: Callable[[Answered], None]) -> Scores:
    """Scores over the whole split (evaluation/metrics.py); `seen` gets each batch, for samples and progress."""
    batches = []
    for answered in answer(programs, weights, pipeline, bank, prompts):
        seen(answered)
        batches.append(answered)
    join = lambda trees: jax.tree.map(lambda *x: np.concatenate(x), *trees)  # noqa: E731
    verdict: Verdict = join([b.verdict for b in batches])
    gold: Gold = join([b.batch.gold for b in batches])
    return summarise(verdict, gold, np.concatenate([b.similarity_P for b in batches]))
