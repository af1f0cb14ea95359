"""The synonym bank: for each taxonomy node the unit vectors of its name and synonyms, and the thresholds of the naming bonus.

PAPERS A8.5: a predicted name is compared with the gold node's name and synonyms; the largest and the mean similarity earn a
bonus above a threshold each. The published thresholds, 0.7 and 0.6, fit one embedder; ours belong to the bank and are set from
its own similarities (`calibrate`). Axes: N taxonomy nodes, S name + synonyms, E embedding width, P prompts, G samples.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from pgjax.models.sentence_encoder import Embedder, TextEncoder
from pgjax.taxonomy import Taxonomy

PUBLISHED_MAX, PUBLISHED_MEAN = 0.7, 0.6  # PAPERS A8.5


@struct.dataclass
class Bank:
    """Row n is the taxonomy's node n in canonical order; an excluded node keeps its row, zero and invalid throughout."""

    embedding_NSE: jax.Array  # float32 unit vectors; entry 0 is the name
    valid_NS: jax.Array  # bool
    max_threshold: float = PUBLISHED_MAX
    mean_threshold: float = PUBLISHED_MEAN
    taxonomy: str = struct.field(pytree_node=False, default="")  # fingerprints of what it was made from
    embedder: str = struct.field(pytree_node=False, default="")


@dataclass(frozen=True)
class CalibrationReport:
    """How well the embedder tells the taxonomy's own synonyms apart. A held-out synonym is compared with its own node's other
    phrases ("within") and with each unrelated node's phrases ("between"); shares and AUROCs lie in [0, 1].
    """

    synonyms: int
    pairs: int  # synonym x unrelated node
    max_threshold: float
    mean_threshold: float
    auroc_max: float  # within against between, by the largest similarity of a pair
    auroc_mean: float
    top1: float  # share of held-out synonyms whose own node has the largest similarity of all
    mean_rank: float  # of the own node; 1 is best
    unpaid: float  # share of held-out synonyms that earn no bonus
    paid_between: float  # share of the pairs that earn one
    unpaid_published: float  # the same two under 0.7 and 0.6
    paid_between_published: float

    @property
    def warnings(self) -> tuple[str, ...]:
        cases = (
            (self.unpaid, self.max_threshold, self.mean_threshold, "add synonyms nearer to them, or try another embedder"),
            (self.unpaid_published, PUBLISHED_MAX, PUBLISHED_MEAN, "do not use the published thresholds with this embedder"),
        )
        return tuple(
            f"{share:.0%} of the held-out synonyms earn nothing under the thresholds {high:.3f} / {mean:.3f}: {advice}"
            for share, high, mean, advice in cases
            if share > 0
        )

    def lines(self) -> list[str]:
        """The report for people, one line a finding, warnings last."""
        return [
            f"{self.synonyms} held-out synonyms, {self.pairs} pairs with an unrelated category",
            f"separability (AUROC within against between): largest {self.auroc_max:.3f}, mean {self.auroc_mean:.3f}",
            f"retrieval of the own category: first {self.top1:.1%}, mean rank {self.mean_rank:.2f}",
            f"thresholds {self.max_threshold:.3f} (largest), {self.mean_threshold:.3f} (mean): "
            f"{self.unpaid:.1%} of the synonyms earn nothing, {self.paid_between:.1%} of the pairs earn something",
            f"published {PUBLISHED_MAX} / {PUBLISHED_MEAN}: {self.unpaid_published:.1%} and {self.paid_between_published:.1%}",
            *(f"warning: {line}" for line in self.warnings),
        ]


def build_bank(taxonomy: Taxonomy, embedder: TextEncoder, exclude: Iterable[str] = ()) -> Bank:
    """Embed every node's name and synonyms; thresholds are the published ones until `calibrate`.

    Phrases of reserved nodes and of those in `exclude` (canonical ids; children are not implied) are not even embedded.
    ValueError for an id that the taxonomy lacks.
    """
    excluded = _excluded(taxonomy, exclude)
    phrases = [() if n in excluded else (node.name, *node.synonyms) for n, node in enumerate(taxonomy.nodes)]
    valid_NS = np.arange(max(map(len, phrases), default=0)) < np.array([len(row) for row in phrases])[:, None]
    embedding_NSE = np.zeros((*valid_NS.shape, embedder.E), np.float32)
    embedding_NSE[valid_NS] = embedder.texts([phrase for row in phrases for phrase in row])
    return Bank(jnp.asarray(embedding_NSE), jnp.asarray(valid_NS), taxonomy=fingerprint(taxonomy), embedder=embedder.fingerprint)


def similarity(bank: Bank, name_PGE: jax.Array, node_P: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines of unit vectors with the phrases of each prompt's node: similarity_PGS and valid_PS; node -1 has no valid phrase."""
    row_P = jnp.maximum(node_P, 0)
    similarity_PGS = jnp.einsum("pge,pse->pgs", name_PGE, bank.embedding_NSE[row_P], precision="highest")
    return similarity_PGS, bank.valid_NS[row_P] & (node_P >= 0)[:, None]


def calibrate(bank: Bank, taxonomy: Taxonomy, leak: float = 0.05) -> tuple[Bank, CalibrationReport]:
    """Set the bank's thresholds from its own similarities, and report what they are worth.

    The rule (our choice): each threshold is the similarity that the share `leak` of the pairs of a synonym and an unrelated node
    exceed, so that a name of another category usually earns nothing, whatever the embedder's scale; whether a held-out synonym
    of the right category usually earns something is then measured, and a warning says when not. A node's parent and children
    are neither within nor between. ValueError when the bank is of another taxonomy or has nothing to compare.
    """
    if bank.taxonomy != fingerprint(taxonomy):
        raise ValueError("calibrate: the bank was built from another taxonomy; build it again")
    within_B2, between_B2, rank_B = _held_out(bank, taxonomy)
    if not len(within_B2) or not len(between_B2):
        raise ValueError("calibrate: needs a node with a synonym and another that is neither its parent nor its child")
    thresholds_2 = np.minimum(np.quantile(between_B2, 1 - leak, axis=0), 0.99)  # below 1: the bonus divides by 1 - threshold
    published_2 = np.array([PUBLISHED_MAX, PUBLISHED_MEAN])

    def paid(similarity_B2: np.ndarray, least_2: np.ndarray) -> float:
        return float((similarity_B2 > least_2).any(1).mean())

    report = CalibrationReport(
        synonyms=len(within_B2),
        pairs=len(between_B2),
        max_threshold=float(thresholds_2[0]),
        mean_threshold=float(thresholds_2[1]),
        auroc_max=_auroc(within_B2[:, 0], between_B2[:, 0]),
        auroc_mean=_auroc(within_B2[:, 1], between_B2[:, 1]),
        top1=float((rank_B == 1).mean()),
        mean_rank=float(rank_B.mean()),
        unpaid=1 - paid(within_B2, thresholds_2),
        paid_between=paid(between_B2, thresholds_2),
        unpaid_published=1 - paid(within_B2, published_2),
        paid_between_published=paid(between_B2, published_2),
    )
    return dataclasses.replace(bank, max_threshold=report.max_threshold, mean_threshold=report.mean_threshold), report


def _held_out(bank: Bank, taxonomy: Taxonomy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(largest, mean) similarity of each held-out synonym to its own node and of each pair to the other node; rank of the own node."""
    embedding_NSE, valid_NS = np.asarray(bank.embedding_NSE), np.asarray(bank.valid_NS)
    ids, parents = np.array([node.id for node in taxonomy.nodes]), np.array([node.parent for node in taxonomy.nodes])
    within, between, ranks = [], [], []
    for n in range(len(ids)):
        other_N = valid_NS.any(1) & (ids != ids[n]) & (ids != parents[n]) & (parents != ids[n])
        for s in np.flatnonzero(valid_NS[n])[1:]:  # entry 0 is the name: it stays
            similarity_NS = embedding_NSE @ embedding_NSE[n, s]
            own_S = np.delete(similarity_NS[n], s)[np.delete(valid_NS[n], s)]
            max_B = np.max(similarity_NS, axis=1, where=valid_NS, initial=-1)[other_N]
            within.append((own_S.max(), own_S.mean()))
            between.append(np.stack([max_B, similarity_NS[other_N].mean(1, where=valid_NS[other_N])], axis=1))
            ranks.append(1 + (max_B > own_S.max()).sum())
    return np.array(within), np.concatenate(between or [np.zeros((0, 2))]), np.array(ranks)


def _auroc(positive_B: np.ndarray, negative_B: np.ndarray) -> float:
    """Chance that a positive exceeds a negative; ties count half."""
    ordered = np.sort(negative_B)
    below = np.searchsorted(ordered, positive_B, "left") + np.searchsorted(ordered, positive_B, "right")
    return float(below.mean() / (2 * len(ordered)))


def save_bank(path: str | Path, bank: Bank) -> None:
    """Write an npz file, aside first, so that no half-written bank is ever read. ValueError where it cannot be written."""
    aside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            np.savez(file, **vars(bank))
        aside.replace(path)
    except OSError as error:
        raise ValueError(f"bank {path}: cannot be written ({error.strerror}); name a file in a folder that can be written to") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written
            aside.unlink()


def load_bank(path: str | Path, taxonomy: Taxonomy, embedder: Embedder, exclude: Iterable[str] = ()) -> Bank:
    """Read a bank for this taxonomy and embedder; ValueError when it was made from others or holds a node to be excluded."""
    try:
        with np.load(path) as file:
            field = {name: file[name] for name in Bank.__dataclass_fields__}
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:  # TypeError: one array, not several
        raise ValueError(f"bank {path}: cannot be read ({error}); make it with `pgjax bank build`") from error
    for name, expected in (("taxonomy", fingerprint(taxonomy)), ("embedder", embedder.fingerprint)):
        if str(field[name]) != expected:
            raise ValueError(f"bank {path}: made with another {name}; make it again with `pgjax bank build`")
    if held := [taxonomy.nodes[n].id for n in sorted(_excluded(taxonomy, exclude)) if field["valid_NS"][n].any()]:
        raise ValueError(f"bank {path}: holds {', '.join(held)}, which this run excludes; make it again with `pgjax bank build`")
    return Bank(
        jnp.asarray(field["embedding_NSE"]),
        jnp.asarray(field["valid_NS"]),
        float(field["max_threshold"]),
        float(field["mean_threshold"]),
        str(field["taxonomy"]),
        str(field["embedder"]),
    )


def fingerprint(taxonomy: Taxonomy) -> str:
    """Names the taxonomy by what a bank takes from it: ids, names and synonyms, in order."""
    return hashlib.sha256(json.dumps([(node.id, node.name, node.synonyms) for node in taxonomy.nodes]).encode()).hexdigest()


def _excluded(taxonomy: Taxonomy, ids: Iterable[str]) -> set[int]:
    return {taxonomy.index(id) for id in ids} | {n for n, node in enumerate(taxonomy.nodes) if node.reserved}
