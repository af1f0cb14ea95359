"""How near the name of a risk comes to its gold category, by a sentence encoder: mean similarity to its phrases, and its rank."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pgjax.bank import Bank
from pgjax.models.sentence_encoder import TextEncoder
from pgjax.taxonomy import Taxonomy


class Near(NamedTuple):
    """Of the nearest category that is right. Without a name 0, infinity and zeros; NaN and no phrases where none is right."""

    mean_P: np.ndarray  # cosine to its name and synonyms
    rank_P: np.ndarray  # among the categories of the row's level, by the largest cosine; 1 is best, a tie counts against it
    similarity_PS: np.ndarray
    valid_PS: np.ndarray


def nearness(
    names: Sequence[str | None], right_PN: np.ndarray, top_P: np.ndarray, nodes: Taxonomy, encoder: TextEncoder, bank: Bank
) -> Near:
    """Each name against the categories that are right for its row, bool [P, N]; `bank` is of `nodes`, by the same encoder.

    Rows `top_P` are judged at the top level: their rivals are the categories, each with the phrases of its subcategories too. The others'
    are the most specific ones. Other right ones are no rivals.
    """
    embedding_NSE, valid_NS = np.asarray(bank.embedding_NSE), np.asarray(bank.valid_NS)
    right_PN = right_PN & valid_NS.any(axis=1)
    has_P = right_PN.any(axis=1)
    found = Near(
        np.where(has_P, 0.0, np.nan),
        np.where(has_P, np.inf, np.nan),
        np.zeros((len(names), valid_NS.shape[1]), np.float32),
        valid_NS[right_PN.argmax(axis=1)] & has_P[:, None],
    )
    said = np.array([p for p, name in enumerate(names) if name and has_P[p]], int)
    if not len(said):
        return found
    row, right = np.arange(len(said)), right_PN[said]
    similarity_PNS = np.einsum("pe,nse->pns", encoder.texts([names[p] or "" for p in said]), embedding_NSE)
    mean_PN = np.where(valid_NS, similarity_PNS, 0.0).sum(axis=2) / np.maximum(valid_NS.sum(axis=1), 1)
    best = np.where(right, mean_PN, -np.inf).argmax(axis=1)
    found.mean_P[said], found.similarity_PS[said], found.valid_PS[said] = mean_PN[row, best], similarity_PNS[row, best], valid_NS[best]

    nearest_PN = np.where(valid_NS, similarity_PNS, -np.inf).max(axis=2)
    folded_PN = nearest_PN.copy()
    for n, node in enumerate(nodes.nodes):
        if node.parent is not None:
            above = nodes.index(node.parent)
            folded_PN[:, above] = np.maximum(folded_PN[:, above], nearest_PN[:, n])
    top_level_N = np.array([node.parent is None for node in nodes.nodes])
    leaf_N = np.isin([node.id for node in nodes.nodes], [node.id for node in nodes.leaves])
    top = top_P[said, None]
    score_PN, rival_PN = np.where(top, folded_PN, nearest_PN), np.where(top, top_level_N, leaf_N) & ~right
    own = np.where(right, score_PN, -np.inf).max(axis=1, keepdims=True)
    found.rank_P[said] = 1 + (rival_PN & (score_PN >= own)).sum(axis=1)
    return found


def ranks(near: Near) -> dict[str, np.ndarray]:
    """Measures of retrieval [P]."""
    return {"naming_mrr": 1 / near.rank_P, "naming_top1": np.where(np.isnan(near.rank_P), np.nan, near.rank_P == 1)}
