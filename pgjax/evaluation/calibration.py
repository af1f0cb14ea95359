"""Fitting a guard's calibration on labelled conversations: temperature, bias and threshold (Guo et al., arXiv 1706.04599; the bias and the
softened labels are Platt's, 1999).

The map is fitted on lines, request and response alike: each is one score with one label. The threshold is chosen on conversations, since
it is the larger score of the two that a verdict compares with it: false positives are conversations that were flagged.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from pgjax.data.schema import ABSENT, SAFE, UNSAFE
from pgjax.data.sources.files import order_of
from pgjax.evaluation.metrics import binary
from pgjax.serving.calibration import EDGE, probability

BINS = 10
FLATTEST = 0.01  # least slope: the order of the scores is the guard's, and stays


class Judged(NamedTuple):
    """Labelled conversations and what a guard said of their lines, request and response."""

    score_P2: np.ndarray  # not calibrated; NaN where the answer has no such line
    label_P2: np.ndarray  # codes of data/schema.py LABELS
    group_P: np.ndarray  # names; rows of one group are no independent evidence

    def rows(self, which_P: np.ndarray) -> "Judged":
        return Judged(*(x[which_P] for x in self))

    @property
    def labelled_P2(self) -> np.ndarray:
        """Lines with a score and a label."""
        return ~np.isnan(self.score_P2) & np.isin(self.label_P2, (SAFE, UNSAFE))

    @property
    def unsafe_P(self) -> np.ndarray:
        return (self.labelled_P2 & (self.label_P2 == UNSAFE)).any(axis=1)

    def top(self, p_P2: np.ndarray) -> np.ndarray:
        """The larger score [P] of two. A response that is not there should not be called unsafe, and counts as safe; a line of unknown
        label is left out, so that no label is invented for the conversation."""
        counted_P2 = self.labelled_P2 | (~np.isnan(self.score_P2) & (self.label_P2 == ABSENT))
        return np.where(counted_P2, p_P2, 0.0).max(axis=1)


class Bin(NamedTuple):
    score: float  # mean
    share: float  # of unsafe lines
    low: float  # ends of its 95% interval (Wilson), for independent lines
    high: float
    lines: int


def fit(judged: Judged, max_fpr: float | None = None) -> tuple[tuple[float, float, float], dict, np.ndarray]:
    """(temperature, bias, threshold) of all rows; what is measured of them; and the calibrated score [P, 2] of each line, held out.

    The threshold is that of largest F1, or with `max_fpr` the lowest one whose false positive rate is at most that. Nothing is measured
    where it was fitted: the groups are dealt into two halves, and each half is judged by the map and the threshold of the other. `before`
    are the scores as they come, at threshold 0.5. Every row has a labelled line. ValueError unless each half has both labels.
    """
    half_P = halves(judged.group_P, judged.unsafe_P)
    p_P2, flagged_P = np.empty_like(judged.score_P2), np.empty(len(half_P), bool)
    for half in (False, True):
        rest, own = judged.rows(half_P != half), judged.rows(half_P == half)
        if rest.unsafe_P.all() or not rest.unsafe_P.any():  # of nothing, both
            raise ValueError("calibration needs safe and unsafe conversations, in two groups each at least; label more rows")
        temperature, bias, threshold = _fit(rest, max_fpr)
        p_P2[half_P == half] = held = probability(own.score_P2, temperature, bias)
        flagged_P[half_P == half] = own.top(held) >= threshold
    labelled_P2, unsafe_P = judged.labelled_P2, judged.unsafe_P
    unsafe_N = judged.label_P2[labelled_P2] == UNSAFE  # by line

    def measure(p_P2: np.ndarray, flagged_P: np.ndarray) -> dict[str, float]:
        p_N = p_P2[labelled_P2]
        decided = binary(unsafe_P, flagged_P, np.ones((1, len(unsafe_P))))
        of_lines = {"ece": calibration_error(p_N, unsafe_N), "nll": _loss(p_N, unsafe_N)}
        return of_lines | {name: float(decided[name][0]) for name in ("f1", "recall", "fpr")}

    counts = {"unsafe": int(unsafe_P.sum()), "safe": int((~unsafe_P).sum()), "groups": len(np.unique(judged.group_P))}
    counts |= {"unsafe_lines": int(unsafe_N.sum()), "safe_lines": int((~unsafe_N).sum())}
    before, after = measure(judged.score_P2, judged.top(judged.score_P2) >= 0.5), measure(p_P2, flagged_P)
    return _fit(judged, max_fpr), {"counts": counts, "before": before, "after": after}, p_P2


def halves(group_P: np.ndarray, unsafe_P: np.ndarray) -> np.ndarray:
    """Which half [P] a row is in: whole groups, those with an unsafe row dealt first, in an order that hangs on their names alone."""
    names = np.unique(group_P)
    risky = set(group_P[unsafe_P])
    dealt = sorted(names, key=lambda name: (name not in risky, order_of(str(name))))
    return np.isin(group_P, dealt[1::2])


def _fit(judged: Judged, max_fpr: float | None) -> tuple[float, float, float]:
    score_N = judged.score_P2[judged.labelled_P2].astype(np.float64)
    temperature, bias = fit_map(score_N, judged.label_P2[judged.labelled_P2] == UNSAFE)
    top_P = judged.top(probability(judged.score_P2, temperature, bias))
    return temperature, bias, choose_threshold(top_P, judged.unsafe_P, max_fpr)


def fit_map(score_N: np.ndarray, unsafe_N: np.ndarray) -> tuple[float, float]:
    """Temperature and bias of least negative log-likelihood. Platt's labels are a little less than sure, so that the scores of labels
    that a threshold separates stay finite."""
    unsafe, safe = int(unsafe_N.sum()), int((~unsafe_N).sum())
    label_N = np.where(unsafe_N, (unsafe + 1) / (unsafe + 2), 1 / (safe + 2))
    odds_N = logit(np.clip(score_N, EDGE, 1 - EDGE))

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        z_N = at[0] * odds_N + at[1]
        wrong_N = expit(z_N) - label_N
        return float(np.mean(np.logaddexp(0, z_N) - label_N * z_N)), np.array([np.mean(wrong_N * odds_N), np.mean(wrong_N)])

    slope, bias = minimize(loss, np.array([1.0, 0.0]), jac=True, bounds=[(FLATTEST, None), (None, None)], tol=1e-12).x
    return 1 / float(slope), float(bias)


def choose_threshold(p_P: np.ndarray, unsafe_P: np.ndarray, max_fpr: float | None) -> float:
    """Half-way between two neighbouring scores, or so low that all are flagged, or so high that none is. Of equals the lowest."""
    scores = np.unique(p_P)
    choices = np.concatenate([[0.0], (scores[1:] + scores[:-1]) / 2, [np.nextafter(scores[-1], 2)]])
    flagged = lambda of_P: of_P.sum() - np.searchsorted(np.sort(p_P[of_P]), choices)  # noqa: E731
    hits, false = flagged(unsafe_P), flagged(~unsafe_P)
    if max_fpr is not None:
        return float(choices[false / (~unsafe_P).sum() <= max_fpr][0])
    return float(choices[np.argmax(2 * hits / (hits + false + unsafe_P.sum()))])


def _loss(p_N: np.ndarray, unsafe_N: np.ndarray) -> float:
    return float(-np.mean(np.log(np.clip(np.where(unsafe_N, p_N, 1 - p_N), EDGE, 1))))


def reliability(p_N: np.ndarray, unsafe_N: np.ndarray) -> list[Bin]:
    """Of those of BINS bins of equal width that hold any line."""
    bin_N = np.minimum((p_N * BINS).astype(int), BINS - 1)
    found = []
    for b in np.unique(bin_N):
        share, n = float(unsafe_N[bin_N == b].mean()), int((bin_N == b).sum())
        z2 = 1.96**2 / n
        middle, reach = (share + z2 / 2) / (1 + z2), np.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
        found.append(Bin(float(p_N[bin_N == b].mean()), share, float(middle - reach), float(middle + reach), n))
    return found


def calibration_error(p_N: np.ndarray, unsafe_N: np.ndarray) -> float:
    """Expected calibration error: the mean gap between score and share of the bins, weighted by lines."""
    return sum(abs(b.score - b.share) * b.lines for b in reliability(p_N, unsafe_N)) / len(p_N)
