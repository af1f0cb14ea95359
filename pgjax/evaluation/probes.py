"""What a guard does with requests that are safe and look otherwise (`probes` of data/sources/texts.py): false positives, and by how much
they go beyond those of the neutral twins."""

from collections.abc import Mapping

import numpy as np

from pgjax.evaluation.metrics import RESAMPLES, interval_of_means

TWIN = "-twin"


def probe_gaps(flagged: Mapping[str, bool], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, dict]:
    """Of each kind of probe, and of "all": `pairs`; `fpr`, `twin_fpr`, and `gap`, the first less the second, with `value`, `low`, `high`.

    `flagged` says by example id whether the guard flagged it; pairs that lack one of the two are left out, and no pairs give {}. The ends
    are those of bootstrap intervals at LEVEL, pairs drawn with replacement; where no pair or every pair is flagged they have no width,
    which says nothing.
    """
    pairs = [id for id in flagged if not id.endswith(TWIN) and id + TWIN in flagged]
    of_kind = {kind: [id for id in pairs if id.split("-")[1] == kind] for kind in dict.fromkeys(id.split("-")[1] for id in pairs)}
    found = {}
    for kind, ids in (of_kind and of_kind | {"all": pairs}).items():
        said_P2 = np.array([[flagged[id], flagged[id + TWIN]] for id in ids], float).reshape(-1, 2)
        value_PC = np.column_stack([said_P2, said_P2[:, 0] - said_P2[:, 1]])
        low_C, high_C = interval_of_means(value_PC, ids, resamples, seed)
        parts = zip(("fpr", "twin_fpr", "gap"), value_PC.mean(axis=0), low_C, high_C, strict=True)
        found[kind] = {"pairs": len(ids)} | {
            name: {"value": float(value), "low": float(low), "high": float(high)} for name, value, low, high in parts
        }
    return found
