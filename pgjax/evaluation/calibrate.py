"""`pgjax calibrate`: labelled conversations through the guard, the calibration of its scores, and a page that shows how good it is."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pgjax.data.schema import LABELS, UNSAFE, Example
from pgjax.evaluation.calibration import BINS, Judged, fit
from pgjax.evaluation.calibration import reliability as bins
from pgjax.pages.charts import reliability, short, text
from pgjax.pages.page import facts, table_of, whole_page
from pgjax.serving.calibration import Calibration
from pgjax.serving.guard import Guard, How, Policy, Unfit
from pgjax.serving.verdict import printable
from pgjax.train.progress import Progress

FEW = 20  # conversations of a label
MEASURES = {
    "ece": "calibration error of the lines (ECE)",
    "nll": "negative log-likelihood of their labels",
    "f1": "F1 of flagged conversations",
    "recall": "unsafe conversations that are flagged",
    "fpr": "safe conversations that are flagged",
}
OTHERS = (
    "scores of other modes, numbers of samples and checkpoints",
    "category scores: each is the larger label score times the category's share, and no share is calibrated",
)


class Calibrated(NamedTuple):
    calibration: Calibration
    judged: Judged
    held_P2: np.ndarray  # calibrated score of each line, held out
    left_out: Counter[str]  # rows and labelled lines without a score, by reason
    max_fpr: float | None


def calibrate(guard: Guard, examples: Sequence[Example], policy: Policy, how: How, model: str, max_fpr: float | None = None) -> Calibrated:
    """Calibrates a guard that was loaded without a calibration, for the mode and the samples of `how`; `model` is its fingerprint.

    ValueError unless there are safe and unsafe conversations in two groups each.
    """
    left_out, cases = Counter[str](), []
    with Progress("calibrate", len(examples)) as progress:
        for number, case in enumerate(guard.judge(((example, None) for example in examples), policy, how), 1):
            if isinstance(case, Unfit):
                left_out[f"rows: {str(case).partition(': ')[2]}"] += 1
            else:
                cases.append(case)
            progress.update(number)
    verdicts = [guard.verdict(case) for case in cases]
    codes = [[LABELS.index(case.example.request_label), LABELS.index(case.example.response_label)] for case in cases]
    scores = [[said["scores"][line] if said["parsed"] else None for line in ("request", "response")] for said in verdicts]
    groups = np.array([case.example.group for case in cases], dtype=str)
    judged = Judged(np.array(scores, float).reshape(-1, 2), np.array(codes, int).reshape(-1, 2), groups)
    parsed_P, known_P2 = np.array([said["parsed"] for said in verdicts], bool), judged.label_P2 <= UNSAFE
    left_out["rows: the answer does not parse"] = int((~parsed_P).sum())
    left_out["rows: no label"] = int((parsed_P & ~known_P2.any(axis=1)).sum())
    left_out["labelled lines: the answer has no such line"] = int((known_P2 & ~judged.labelled_P2)[parsed_P].sum())
    left_out = +left_out  # without zeros
    judged = judged.rows(judged.labelled_P2.any(axis=1))
    try:
        (temperature, bias, threshold), measured, held_P2 = fit(judged, max_fpr)
    except ValueError as error:
        raise ValueError(". ".join([str(error), *reasons(left_out)])) from error
    return Calibrated(Calibration(temperature, bias, threshold, how.mode, how.samples, model, measured), judged, held_P2, left_out, max_fpr)


def reasons(left_out: Counter[str]) -> list[str]:
    return [f"Left out {number} {printable(reason, 200)}" for reason, number in left_out.most_common()]


def warnings(measured: Mapping[str, Mapping[str, float]]) -> list[str]:
    few = {label: measured["counts"][label] for label in ("safe", "unsafe") if measured["counts"][label] < FEW}
    return [f"only {number} {label} conversations: the figures are loose; label more" for label, number in few.items()]


def about(made: Calibrated) -> dict[str, str]:
    found, counts = made.calibration, made.calibration.measured["counts"]
    rule = "largest F1" if made.max_fpr is None else f"false positive rate at most {made.max_fpr:g}"
    return {
        "calibrated": f"label scores of request and response, mode {found.mode}, samples {found.samples}",
        "map of the log-odds": f"divided by {short(found.temperature)}, then {found.bias:+.3g}",
        "threshold": f"{short(found.threshold)} on the larger score ({rule})",
        "conversations": f"{counts['unsafe']} unsafe, {counts['safe']} safe, in {counts['groups']} groups",
        "lines": f"{counts['unsafe_lines']} unsafe, {counts['safe_lines']} safe",
    }


def summary(made: Calibrated) -> str:
    """For people at a terminal."""
    measured = made.calibration.measured
    lines = [f"{name + ':':<21} {value}" for name, value in about(made).items()]
    lines += [f"{'not calibrated:':<21} {other}" for other in OTHERS]
    lines += ["", f"{'':<42} {'before':>9} {'held out':>9}"]
    lines += [f"{name:<42} {short(measured['before'][key]):>9} {short(measured['after'][key]):>9}" for key, name in MEASURES.items()]
    return "\n".join([*lines, "", *reasons(made.left_out), *(f"warning: {warning}" for warning in warnings(measured))]).rstrip()


def page(made: Calibrated, title: str, not_a_guard: bool) -> str:
    """One file, no scripts, nothing fetched; numbers alone, no texts of conversations."""
    measured, labelled_P2 = made.calibration.measured, made.judged.labelled_P2
    unsafe_N = (made.judged.label_P2 == UNSAFE)[labelled_P2]
    series = {name: bins(p_P2[labelled_P2], unsafe_N) for name, p_P2 in (("before", made.judged.score_P2), ("held out", made.held_P2))}
    rows = "".join(
        f"<tr><td>{name}</td><td>{short(measured['before'][key])}</td><td>{short(measured['after'][key])}</td></tr>"
        for key, name in MEASURES.items()
    )
    notes = [
        "Before: scores as the guard gives them, threshold 0.5. Held out: each half of the groups under the map and the threshold that "
        "were fitted on the other half; what is written beside the model is fitted on both.",
        "On the diagonal a score is a probability: of the lines in a bin, that share is unsafe. Upright lines are 95% intervals, for lines "
        "that are independent; bars are lines in a bin.",
    ]
    toy = ["A toy or demo model: not a guard."] * not_a_guard
    head = "".join(f'<div><p class="warning">{text(warning)}</p></div>' for warning in [*toy, *warnings(measured)])
    figures = f"{table_of('', 'before', 'held out', rows=rows)}<p>{notes[0]}</p>"
    curve = reliability("Lines, by score", series, BINS, "score", "share of unsafe lines")
    sections = {
        "Measured": figures + "".join(f"<p>{text(reason)}.</p>" for reason in reasons(made.left_out)),
        "Reliability": f'<p>{notes[1]}</p><div class="grid">{curve}</div>',
        "Not calibrated": "".join(f"<p>{other[0].upper()}{other[1:]}.</p>" for other in OTHERS),
    }
    return whole_page(title, f"<h1>Calibration of {text(title, 200)}</h1>{head}{facts(about(made))}", sections)
