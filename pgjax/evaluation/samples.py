"""What samples/STEP.jsonl keeps of each held-out row: ids, codes and numbers; texts only where they may be kept."""

import numpy as np

from pgjax.data.schema import CATEGORIES
from pgjax.evaluation.evaluate import Answered
from pgjax.taxonomy import Taxonomy


def sample_rows(answered: Answered, taxonomy: Taxonomy, content: bool) -> list[dict]:
    """One JSON object for each row of a batch with its greedy answers; rows that only pad are left out.

    * `id`, `source`, `modality`, `request_label`, `response_label`, `node`: as in the `Example`.
    * `category`: its kind in this prompt, "ood" where the gold node is hidden; `never_seen`: OOD of the second kind.
    * `shown`: the ids that the prompt's policy lists; `said`: canonical id of the node that the answer named by its id, or null.
    * `verdict`: the codes of `automaton.Verdict`; `length`: tokens of the answer; `reward` and its `terms` (rewards.py).
    * `score_request`, `score_response`: probability of unsafe; null where the answer has no such line.
    * `naming` and its like: how near the answer's name comes to its gold node, by measure; null where nothing can be near.
    * with `content`: the texts `request`, `response` (null where there is none) and `answer`.
    """
    rows = []
    for p, (example, view) in enumerate(answered.batch.rows):
        row = {name: getattr(example, name) for name in ("id", "source", "modality", "request_label", "response_label", "node")}
        verdict = {name: int(value[p]) for name, value in vars(answered.verdict).items()}
        gold = answered.batch.gold
        node = int(gold.node_of_id_PK[p, verdict["id"]]) if verdict["id"] >= 0 else -1
        row |= {
            "category": CATEGORIES[gold.category_P[p]],
            "never_seen": bool(gold.never_seen_P[p]),
            "shown": [shown for shown, _ in view.entries],
            "said": taxonomy.nodes[node].id if node >= 0 else None,
            "verdict": verdict,
            "length": int(answered.length_P[p]),
            "reward": float(answered.reward_P[p]),
            "terms": {name: float(term_P[p]) for name, term_P in answered.terms.items()},
        }
        row |= {f"score_{line}": _number(score_P[p]) for line, score_P in answered.scores.items()}
        row |= {measure: _number(near_P[p]) for measure, near_P in answered.naming.items()}
        if content:
            row |= {"request": example.request, "response": example.response, "answer": answered.texts[p]}
        rows.append(row)
    return rows


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN
