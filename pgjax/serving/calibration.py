"""The calibration of a guard's label scores: a temperature and a bias on their log-odds, and a threshold. It holds for the mode and the
number of samples that it was measured with, and for the weights; evaluation/calibration.py fits it.

A verdict puts the map on both lines, and compares the larger score of the two with the threshold.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

from pgjax.files import read_json, replace_file
from pgjax.serving.scores import Scores
from pgjax.train.saved import fingerprint

CALIBRATION = "calibration.json"  # beside the model
EDGE = 1e-9  # scores are kept this far from 0 and 1: their log-odds must be finite


@dataclass(frozen=True)
class Calibration:
    temperature: float
    bias: float
    threshold: float  # on the larger calibrated score of a conversation
    mode: str
    samples: int
    model: str  # fingerprint of the weights
    measured: Mapping[str, Mapping[str, float]]  # see `fit`

    def apply(self, scores: Scores) -> Scores:
        of = lambda p: None if p is None else float(self.probability(np.float64(p)))  # noqa: E731
        return scores._replace(request=of(scores.request), response=of(scores.response))

    def probability(self, score_P: np.ndarray) -> np.ndarray:
        return probability(score_P, self.temperature, self.bias)


def probability(score_P: np.ndarray, temperature: float, bias: float) -> np.ndarray:
    return expit(logit(np.clip(score_P, EDGE, 1 - EDGE)) / temperature + bias)


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    replace_file(folder / CALIBRATION, json.dumps(dataclasses.asdict(calibration), indent=2) + "\n")
    return folder / CALIBRATION


def read_calibration(folder: Path, best: bool) -> Calibration | None:
    """That of a model, None where there is none. ValueError for one that is broken, or was measured on another checkpoint: passed over,
    it would take the guard's threshold with it and nobody would know."""
    file = folder / CALIBRATION
    if not file.exists():
        return None
    what_to_do = "run `pgjax calibrate` again, or remove the file"
    try:
        found = Calibration(**read_json(file))
        whole = all(np.isfinite([found.temperature, found.bias, found.threshold])) and found.temperature > 0
    except TypeError:  # other keys, or no numbers
        whole = False
    if not whole:
        raise ValueError(f"{file} is no calibration of this version; {what_to_do}")
    if found.model != fingerprint(folder, best):
        raise ValueError(f"{file} was measured on another checkpoint than the one asked for; {what_to_do}")
    return found
