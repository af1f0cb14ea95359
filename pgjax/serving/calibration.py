"""Calibration of label scores on labelled conversations: a temperature and a bias on their log-odds, and a threshold (Guo et al.,
arXiv 1706.04599; the bias is Platt's). A guard is calibrated for the mode and the number of samples that it was measured with, alone."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

from pgjax.serving.scores import Scores

BINS = 10
EDGE = 1e-6  # scores are kept this far from 0 and 1: their log-odds must be finite


@dataclass(frozen=True)
class Calibration:
    temperature: float
    bias: float
    threshold: float
    mode: str
    samples: int
    fitted_on: Mapping[str, float]  # what `fit` measured

    def apply(self, scores: Scores) -> Scores:
        of = lambda p: None if p is None else float(self.probability(np.float64(p)))  # noqa: E731
        return scores._replace(request=of(scores.request), response=of(scores.response))

    def probability(self, score_P: np.ndarray) -> np.ndarray:
        return expit(logit(np.clip(score_P, EDGE, 1 - EDGE)) / self.temperature + self.bias)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)


def fit(score_P: np.ndarray, unsafe_P: np.ndarray, mode: str, samples: int, max_fpr: float | None = None) -> Calibration:
    """Temperature and bias of least negative log-likelihood; the threshold of largest F1, or with `max_fpr` the lowest one whose false
    positive rate is at most that. ValueError unless both labels are there."""
    if unsafe_P.all() or not unsafe_P.any():
        raise ValueError("calibration needs rows of both labels, safe and unsafe")
    odds_P = logit(np.clip(score_P.astype(np.float64), EDGE, 1 - EDGE))

    def loss(at: np.ndarray) -> float:
        z_P = odds_P * np.exp(-at[0]) + at[1]
        return float(np.mean(np.logaddexp(0, np.where(unsafe_P, -z_P, z_P)))) + 1e-4 * float(at @ at)  # separable labels stay finite

    found = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    made = Calibration(float(np.exp(found[0])), float(found[1]), 0.5, mode, samples, {})
    p_P = made.probability(score_P)
    choices = np.unique(np.append(p_P, 0.5))
    said = p_P[None] >= choices[:, None]
    hit, false = (said & unsafe_P).sum(1), (said & ~unsafe_P).sum(1)
    f1, fpr = 2 * hit / (hit + false + unsafe_P.sum()), false / (~unsafe_P).sum()
    if max_fpr is None:
        best = int(np.flatnonzero(f1 == f1.max())[np.abs(choices[f1 == f1.max()] - 0.5).argmin()])
        threshold = float(choices[best])
    else:
        allowed = np.flatnonzero(fpr <= max_fpr)
        threshold = float(choices[allowed[0]]) if len(allowed) else float(np.nextafter(choices[-1], 2))
    at = p_P >= threshold
    measured = {
        "rows": len(score_P),
        "unsafe": int(unsafe_P.sum()),
        "ece_before": calibration_error(score_P, unsafe_P),
        "ece_after": calibration_error(p_P, unsafe_P),
        "nll_before": _likelihood(score_P, unsafe_P),
        "nll_after": _likelihood(p_P, unsafe_P),
        "f1": float(2 * (at & unsafe_P).sum() / (at.sum() + unsafe_P.sum())),
        "fpr": float((at & ~unsafe_P).sum() / (~unsafe_P).sum()),
        "recall": float((at & unsafe_P).sum() / unsafe_P.sum()),
    }
    return dataclasses.replace(made, threshold=threshold, fitted_on=measured)


def _likelihood(p_P: np.ndarray, unsafe_P: np.ndarray) -> float:
    return float(-np.mean(np.log(np.clip(np.where(unsafe_P, p_P, 1 - p_P), EDGE, 1))))


def reliability(p_P: np.ndarray, unsafe_P: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean score, share of unsafe, rows) of each bin of equal width that holds any."""
    bin_P = np.minimum((p_P * bins).astype(int), bins - 1)
    here = [bin_P == b for b in range(bins)]
    return [(float(p_P[rows].mean()), float(unsafe_P[rows].mean()), int(rows.sum())) for rows in here if rows.any()]


def calibration_error(p_P: np.ndarray, unsafe_P: np.ndarray) -> float:
    """Expected calibration error: the mean gap of `reliability`, weighted by rows."""
    return float(sum(abs(score - share) * rows for score, share, rows in reliability(p_P, unsafe_P)) / len(p_P))
