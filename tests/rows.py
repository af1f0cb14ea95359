"""Verdicts and gold labels as arrays, from one tuple a row; what tests of rewards and of metrics share."""

import numpy as np

from pgjax.automaton import Verdict
from pgjax.data.schema import Gold


def gold_arrays(fields, nodes: int, shown_PK, accepted=()) -> Gold:
    """Gold [P] from rows of (modality, request, response, category, node), or of these and (never seen, weight).

    `accepted` has the further right nodes of each row; all of them and the node itself are in `accepted_PN`, [P, nodes].
    """
    modality_P, request_P, response_P, category_P, node_P, *rest = (np.array(column, np.int32) for column in zip(*fields, strict=True))
    never_seen_P, weight_P = rest or (np.zeros(len(node_P)), np.ones(len(node_P)))
    accepted_PN = node_P[:, None] == np.arange(nodes)
    for row, more in enumerate(accepted):
        accepted_PN[row, list(more)] = True
    return Gold(
        *(modality_P, request_P, response_P, category_P, node_P, np.array(shown_PK, np.int32), accepted_PN),
        never_seen_P=never_seen_P.astype(bool),
        weight_P=weight_P.astype(np.float32),
    )


def verdict_arrays(fields) -> Verdict:
    """Verdicts from an array [..., 5] of (parsed, request, response, kind, id)."""
    fields = np.array(fields)
    return Verdict(fields[..., 0].astype(bool), *(fields[..., i] for i in range(1, 5)))
