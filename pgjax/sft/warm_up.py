"""The warm-up of a toy recipe: a supervised stage before GRPO.

It gives the right labels on a stated share of the prompts; on the others labels are drawn at random and their tokens carry no loss, so
that format, ids and names are learnt everywhere and labels from that share alone. The tokens of right labels weigh more in turn, by the
inverse of the share: the expected loss is that of labels everywhere.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from pgjax.config import Recipe
from pgjax.data.pipeline import Batch, Pipeline
from pgjax.generate.law import Law
from pgjax.generate.score import answer_rows
from pgjax.parallel.mesh import place_rows
from pgjax.sft.step import make_step, taught
from pgjax.tokenizer import answer_ids
from pgjax.train.setup import Setup, make_setup
from pgjax.train.update import make_optimizer


def answer_arrays(texts_PG: Sequence[Sequence[str]], tokenizer, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers as tokens int32 [P, G, R], each closed by the stop token, and lengths [P, G]. ValueError for one that is too long."""
    return answer_rows([answer_ids(tokenizer, texts) for texts in texts_PG], limit)


def label_tokens(tokenizer, vocab: int) -> np.ndarray:
    """bool [V]: tokens that spell a label, with or without the colon before it."""
    label_V = np.zeros(vocab, bool)
    for id in range(len(tokenizer)):
        label_V[id] = tokenizer.decode([id]).lstrip(":") in ("safe", "unsafe", "safe\n", "unsafe\n")
    return label_V


def train(
    recipe: Recipe,
    setup: Setup,
    law: Law,
    params: dict,
    pipeline: Pipeline,
    answers: Callable[[Batch, int], tuple[Sequence[Sequence[str]], np.ndarray]],
    tokenizer,
    log: Callable[[int, dict[str, float]], None],
) -> dict:
    """Run `recipe.warm_up.steps` updates from `params`; returns the trained parameters.

    All of the base model is trained, whatever the recipe freezes later: here the stage stands for what a checkpoint brings along.

    `answers(batch, step)` gives `warm_up.answers` texts for each prompt of the batch, and bool [P]: are its labels right, and so
    supervised.
    `log(step, metrics)` is called after every step.
    """
    config, R, mesh = recipe.warm_up, recipe.answer.max_tokens, setup.mesh
    setup = make_setup(dataclasses.replace(setup.model.config, freeze_vision=False, lora_rank=0), mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = setup.state(params, optimizer)

    label_V = label_tokens(tokenizer, recipe.model.text.vocab)
    step = make_step(setup, law, optimizer, "warm_up/loss")
    with jax.set_mesh(mesh):
        for k in range(config.steps):
            batch = pipeline.batch(k, config.prompts)
            texts, right_P = answers(batch, k)
            tokens_PGR, length_PG = answer_arrays(texts, tokenizer, R)
            label_weight_P = right_P / config.label_share  # so that labels weigh as if all prompts had them
            weight_PGR = np.where(label_V[tokens_PGR], label_weight_P[:, None, None], 1.0)
            lessons = place_rows(taught(batch.prompt, tokens_PGR, length_PG, weight_PGR), mesh)
            state, metrics = step(state, {}, lessons, width=config.answers * R)
            log(k + 1, {name: float(value) for name, value in metrics.items()})
    return state.params
