"""The evaluation of given answers: the model is replaced, everything behind it is real."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_recipe import ONE, R, host_params, materials, programs, tiny_recipe

from pgjax import automaton as answers
from pgjax.conversation import answer_text
from pgjax.data.schema import CATEGORY_NODE, CATEGORY_OOD, LABELS
from pgjax.evaluation.evaluate import evaluate
from pgjax.evaluation.metrics import summarise, table
from pgjax.generate.decode import Rollout
from pgjax.models import static_encoder
from pgjax.sft.warm_up import answer_arrays

PROMPTS = 16  # 24 rows: the last batch has filler


def right_answer(example, view, category: int) -> str:
    """What the gold asks for; an unlisted risk by the phrase of its node that takes fewest tokens."""
    m = materials()
    tokens = lambda phrase: len(m.tokenizer(phrase)["input_ids"])  # noqa: E731
    node = m.held_out._node(example, example.node)
    said = None
    if category == CATEGORY_NODE:
        said = next(id for id, shown in view.entries if shown == node)
    elif category == CATEGORY_OOD:
        said = min((m.taxonomy.nodes[node].name, *m.taxonomy.nodes[node].synonyms), key=tokens)
    return answer_text(example.request_label, example.response_label, said, "", example.modality, "think")


def wrong_answer(example, view, category: int) -> str:
    return "<answer>\nRequest:safe\nResponse:"


@functools.cache
def machine():
    return programs(ONE, tiny_recipe(), optax.sgd(0.0))


def evaluated(written):
    """Rows of the held-out split whose answers are `written(example, view, category)`, and the batches that `seen` got."""
    m, p, batches = materials(), machine(), []
    queue = [m.held_out.batch(k, PROMPTS) for k in range(m.held_out.batches(PROMPTS))]

    def rollout(weights, prompt, gold, *, group, greedy):
        batch = queue.pop(0)
        texts = [written(*row, category) for row, category in zip(batch.rows, batch.gold.category_P, strict=False)]
        texts += [texts[0]] * (PROMPTS - len(texts))
        tokens_PGR, length_PG = answer_arrays([[text] for text in texts], m.tokenizer, R)
        final_PG = answers.run(m.automaton, jnp.asarray(tokens_PGR), jnp.asarray(length_PG), jnp.asarray(batch.gold.modality_P)[:, None])
        empty = jnp.zeros(tokens_PGR.shape)
        return Rollout(jnp.asarray(tokens_PGR), empty, empty.astype(jnp.int32), jnp.asarray(length_PG), final_PG), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p, "rollout", rollout)
        rows = evaluate(p, host_params(), m.held_out, m.full_bank, PROMPTS, batches.append)
    return rows, batches


def test_right_answers_score_fully():
    rows, batches = evaluated(right_answer)
    got = summarise(rows)
    assert got["n"] == tiny_recipe().data.eval_examples and got["parse_failures"] == 0
    for name in (
        "request_f1",
        "response_accuracy",
        "category_accuracy",
        "ood_f1",
        "naming_top1",
        "naming_mrr",
        "text_image/request_accuracy",
    ):
        assert got[name] == 1, name
    assert got["request_fpr"] == 0 == got["ood_fpr"] and 0.2 < got["naming"] < 1 and got["ood_masked_n"] < got["ood_n"] == got["n"]
    assert ("naming_second" in got) == (static_encoder.load_static_encoder() is not None)
    assert 0 < got["request_auroc"] < 1  # of a model that knows nothing
    last = batches[-1]
    assert len(last.texts) == PROMPTS > len(last.batch.rows) and "<answer>" in last.texts[0]
    has_line = np.array([LABELS[code] != "absent" for code in last.verdict.response])
    assert (np.isfinite(last.scores["request"])).all() and (np.isfinite(last.scores["response"]) == has_line).all()
    groups = [example.group for b in batches for example, _ in b.batch.rows]
    assert len(set(rows.group_P[rows.gold.weight_P > 0].tolist())) == len(set(groups))


def test_wrong_answers_score_nothing():
    rows, _ = evaluated(wrong_answer)
    got = summarise(rows)
    assert got["parse_failures"] == got["n"]
    for name in ("request_f1", "ood_f1", "naming", "request_auroc", "naming_mrr", "naming_top1"):
        assert got[name] == 0, name


def test_the_table_of_an_evaluation_is_json():
    rows, _ = evaluated(right_answer)
    found = table(rows, resamples=20)
    assert json.loads(json.dumps(found)) == found
    assert found["scores"]["request_f1"] == {"value": 1.0, "low": 1.0, "high": 1.0, "rows": found["counts"]["request_n"]}
    assert "image/n" in found["counts"] and "image/request_f1" in found["scores"]
