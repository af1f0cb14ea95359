"""Held-out figures of a run beside three baselines on the same split, as a Markdown table.

python benchmarks/baselines.py runs/public_mix        (needs the extra `bench`)

Everything is read from the run folder: the rows that its pipelines kept, and the answers in samples/. The baselines see what the
model saw: they are fitted on the kept training rows, and read request and response, not pictures.

* majority: the label that most training rows have;
* majority per source: the label that most training rows of the same source have, or else the majority's;
* TF-IDF + logistic regression: words and pairs of words.

The headline takes the held-out rows of sources that hold both labels and that training sees: where a source has one label, naming
the source is enough, and a set for evaluation only has no majority to compare with. An answer that does not parse is wrong, and
its score is at the wrong end.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline

from pgjax.data.build import read_dataset
from pgjax.data.schema import EVALUATION_ONLY, SAFE, UNSAFE


class Row(NamedTuple):
    id: str
    source: str
    text: str
    unsafe: bool


class System(NamedTuple):
    name: str
    unsafe_B: np.ndarray  # bool, one for each held-out row
    score_B: np.ndarray | None  # the more, the likelier unsafe


def kept_rows(run: Path, split: str) -> list[Row]:
    """What the run's pipeline kept of a split, rows without a known request label aside."""
    try:
        kept = json.loads((run / "data" / f"fit_{split}.json").read_text())["kept"]
    except OSError as error:
        raise ValueError(f"{run} holds no data of a run ({error.strerror}: {error.filename}); give the folder of one") from None
    examples = read_dataset(run / "data", split)
    rows = (examples[k] for k in kept)
    return [
        Row(e.id, e.source, "\n".join(filter(None, (e.request, e.response))), e.request_label == "unsafe")
        for e in rows
        if e.request_label in ("safe", "unsafe")
    ]


def baselines(train: list[Row], held_out: list[Row]) -> list[System]:
    majority = Counter(row.unsafe for row in train).most_common(1)[0][0]
    of_source = {s: Counter(row.unsafe for row in train if row.source == s).most_common(1)[0][0] for s in {row.source for row in train}}
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    model.fit([row.text for row in train], [row.unsafe for row in train])
    probability_B = model.predict_proba([row.text for row in held_out])[:, 1]
    same_B = np.full(len(held_out), majority)
    source_B = np.array([of_source.get(row.source, majority) for row in held_out])
    return [
        System("majority", same_B, same_B.astype(float)),
        System("majority per source", source_B, source_B.astype(float)),
        System("TF-IDF + logistic regression", probability_B > 0.5, probability_B),
    ]


def answers(path: Path, held_out: list[Row]) -> System:
    """The run's own answers in one samples file. ValueError where the file is about other rows."""
    samples = {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    if missing := [row.id for row in held_out if row.id not in samples]:
        raise ValueError(f"{path} lacks {len(missing)} of {len(held_out)} held-out rows, {missing[0]} among them: not of this split")
    said, scores = [], []
    for row in held_out:
        sample = samples[row.id]
        code = sample["verdict"]["request"] if sample["verdict"]["parsed"] else -1
        said.append({UNSAFE: True, SAFE: False}.get(code, not row.unsafe))
        score = sample.get("score_request")
        scores.append(float(not row.unsafe) if score is None else score)
    scored = any(sample.get("score_request") is not None for sample in samples.values())
    step = int(path.stem)
    return System("pgjax after warm-up" if step == 0 else f"pgjax, step {step}", np.array(said), np.array(scores) if scored else None)


def figures(system: System, unsafe_B: np.ndarray, chosen_B: np.ndarray) -> list[str]:
    """Unsafe F1, weighted F1, AUROC over the chosen rows, as table cells; a dash where it is not defined."""
    gold, said = unsafe_B[chosen_B], system.unsafe_B[chosen_B]
    f1 = f"{f1_score(gold, said, zero_division=0):.3f}" if gold.any() else "-"
    weighted = f"{f1_score(gold, said, average='weighted', zero_division=0):.3f}"
    both = gold.any() and not gold.all()
    auroc = f"{roc_auc_score(gold, system.score_B[chosen_B]):.3f}" if both and system.score_B is not None else "-"
    return [f1, weighted, auroc]


def table(train: list[Row], held_out: list[Row], systems: list[System]) -> list[str]:
    """Markdown lines: the headline, then each source, each system a line."""
    unsafe_B = np.array([row.unsafe for row in held_out])
    source_B = np.array([row.source for row in held_out])
    trained = {row.source for row in train}
    sources = sorted(set(source_B))
    headline = [s for s in sources if s in trained and len(set(unsafe_B[source_B == s])) == 2]
    if not headline:
        raise ValueError("no held-out source of training has both labels: there is no headline to give")
    parts = [("**headline**: " + ", ".join(headline), np.isin(source_B, headline))]
    for source in sources:
        note = " (evaluation only)" if source in EVALUATION_ONLY else "" if source in headline else " (one label)"
        parts.append((source + note, source_B == source))
    lines = ["| source | n | unsafe | system | unsafe F1 | weighted F1 | AUROC |", "|---|---|---|---|---|---|---|"]
    for name, chosen_B in parts:
        for system in systems:
            cells = [name, str(chosen_B.sum()), str(unsafe_B[chosen_B].sum()), system.name, *figures(system, unsafe_B, chosen_B)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(run: Path) -> list[str]:
    train, held_out = kept_rows(run, "train"), kept_rows(run, "eval")
    files = sorted((run / "samples").glob("*.jsonl"), key=lambda path: int(path.stem))
    systems = baselines(train, held_out) + [answers(path, held_out) for path in dict.fromkeys(files[:1] + files[-1:])]
    dropped = {split: json.loads((run / "data" / f"fit_{split}.json").read_text())["dropped"] for split in ("train", "eval")}
    left_out = json.loads((run / "data" / "left_out.json").read_text())
    counts = [
        f"* {len(train)} training rows, {len(held_out)} held-out rows",
        f"* left out by the readers: {listed({f'{s}, {reason}': n for s, reasons in left_out.items() for reason, n in reasons.items()})}",
        *(f"* dropped from the split {split}: {listed(reasons)}" for split, reasons in dropped.items()),
    ]
    return [*counts, "", *table(train, held_out, systems)]


def listed(counts: dict[str, int]) -> str:
    return "; ".join(f"{reason} {n}" for reason, n in counts.items()) or "none"


if __name__ == "__main__":
    try:
        print("\n".join(report(Path(sys.argv[1]))))
    except (IndexError, ValueError) as error:
        sys.exit(f"baselines: {error}" if isinstance(error, ValueError) else "usage: python benchmarks/baselines.py RUN")
