"""Writes tests/fixtures/metrics.json with scikit-learn; the suite itself does not need it.

    python tests/golden/make_metrics.py

Random labels, predictions, scores with many ties, and whole-number weights, and what scikit-learn makes of them.
"""

import json
from pathlib import Path

import numpy as np
from sklearn import metrics

FIXTURE = Path(__file__).parents[1] / "fixtures" / "metrics.json"


def case(seed: int, n: int, share: float, levels: int) -> dict:
    rng = np.random.default_rng(seed)
    gold, score = rng.random(n) < share, rng.integers(0, levels, n) / levels
    said, weight = (score + rng.normal(0, 0.4, n) + 0.2 * gold) > 0.5, rng.integers(0, 4, n)

    def scores(weight) -> dict[str, float]:
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            gold, said, average="binary", zero_division=0, sample_weight=weight
        )
        (true_neg, false_pos), _ = metrics.confusion_matrix(gold, said, sample_weight=weight)
        return {
            "accuracy": metrics.accuracy_score(gold, said, sample_weight=weight),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "weighted_f1": metrics.f1_score(gold, said, average="weighted", sample_weight=weight),
            "fpr": false_pos / (false_pos + true_neg),
            "auroc": metrics.roc_auc_score(gold, score, sample_weight=weight),
        }

    given = {"gold": gold, "said": said, "score": score, "weight": weight}
    return {name: values.tolist() for name, values in given.items()} | {"once": scores(np.ones(n)), "weighted": scores(weight)}


if __name__ == "__main__":
    cases = [case(0, 40, 0.5, 8), case(1, 60, 0.1, 3), case(2, 25, 0.8, 1000), case(3, 50, 0.3, 1)]
    FIXTURE.write_text(json.dumps(cases, default=float) + "\n")
