"""From answers to a verdict: what one says, what several agree on, and whether that flags the conversation."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pgjax import automaton as answers
from pgjax.automaton import Automaton
from pgjax.data.schema import LABELS
from pgjax.serving import scores as scoring
from pgjax.serving.calibration import Calibration
from pgjax.serving.scores import Scores
from pgjax.taxonomy import Taxonomy

NAME_LIMIT, REASONING_LIMIT = 80, 2000  # characters that are shown
_ADDRESS = re.compile(r"[:/@]|\w[.\u3002]\w")  # in a word: a scheme, a path, a mailbox, a host
_INITIALS = re.compile(r"(?:[A-Z]\.){2,}")  # U.S.


class Reading(NamedTuple):
    """What one answer says. Labels are safe, unsafe or None (no such line, or not parsed)."""

    request: str | None
    response: str | None
    id: str | None  # as the prompt shows it
    node: int  # that it stands for there, -1 for none
    name: str | None  # a risk in the answer's own words
    reasoning: str
    parsed: bool
    scores: Scores

    @property
    def unsafe(self) -> bool:
        return "unsafe" in (self.request, self.response)


def read(text: str, state: int, tables: Automaton, node_of_id_K: np.ndarray, think_tag: str, scores: Scores) -> Reading:
    """An answer that ended in automaton state `state`; `tables` is the automaton as numpy."""
    verdict = answers.verdict(tables, state)
    label = lambda code: LABELS[code] if LABELS[code] in ("safe", "unsafe") else None  # noqa: E731
    kind, id = int(verdict.kind), int(verdict.id)
    reasoning = text.partition(f"<{think_tag}>")[2].partition(f"</{think_tag}>")[0]
    return Reading(
        label(verdict.request),
        label(verdict.response),
        tables.ids[id] if kind == answers.ID else None,
        int(node_of_id_K[id]) if kind == answers.ID else -1,
        free_name(answers.category_text(text) or "") if kind == answers.NAME else None,
        printable(reasoning, REASONING_LIMIT),
        bool(verdict.parsed),
        scores,
    )


def verdict(
    readings: Sequence[Reading], taxonomy: Taxonomy, threshold: float | None, fail_open: bool, calibration: Calibration | None
) -> dict:
    """The verdict of one answer or of several to the same conversation, by majority of those that parse; a tie is unsafe.

    Keys: flagged; flagged_by (label: no threshold is set and a label is unsafe; score: the larger score reaches the threshold; failure: no
    answer parsed, and the guard fails closed; null); request, response (safe, unsafe or null); category_id (of the policy), category_name,
    in_policy (null where all is safe); reasoning (of an answer that says so); scores {request, response, categories {id: probability},
    outside_policy}; calibrated; threshold; votes {request, response} (shares of unsafe); parsed; fail (closed or open).
    """
    parsed = [reading for reading in readings if reading.parsed]
    votes = {line: [getattr(r, line) == "unsafe" for r in parsed if getattr(r, line)] for line in ("request", "response")}
    share = {line: float(np.mean(said)) if said else None for line, said in votes.items()}
    labels = {line: None if part is None else "unsafe" if part >= 0.5 else "safe" for line, part in share.items()}
    unsafe = "unsafe" in labels.values()
    agree = [r for r in parsed if r.unsafe == unsafe]
    named = Counter((r.id, r.node, r.name) for r in agree if unsafe).most_common(1)
    id, node, name = named[0][0] if named else (None, -1, None)
    said = next((r for r in agree if (r.id, r.node, r.name) == (id, node, name) or not unsafe), (parsed or list(readings))[0])
    scores = scoring.mean([r.scores for r in readings])
    if calibration:
        scores = calibration.apply(scores)
    known = [score for score in (scores.request, scores.response) if score is not None]
    top = max(known) if known else None
    by_score = threshold is not None and top is not None
    if not parsed:
        flagged, why = (not fail_open, None if fail_open else "failure")
    else:
        flagged = top >= threshold if by_score else unsafe
        why = ("score" if by_score else "label") if flagged else None
    rounded = lambda score: None if score is None else round(score, 9)  # noqa: E731
    return {
        "flagged": flagged,
        "flagged_by": why,
        **labels,
        "category_id": id,
        "category_name": taxonomy.nodes[node].name if node >= 0 else name,
        "in_policy": node >= 0 if unsafe else None,
        "reasoning": said.reasoning,
        "scores": {
            "request": rounded(scores.request),
            "response": rounded(scores.response),
            # of a listed category: that something is unsafe, and that this is what it is called
            "categories": {name: rounded(part * (top or 0.0)) for name, part in scores.categories.items()},
            "outside_policy": rounded(None if scores.outside is None else scores.outside * (top or 0.0)),
        },
        "calibrated": calibration is not None,
        "threshold": threshold,
        "votes": {line: rounded(part) for line, part in share.items()},
        "parsed": bool(parsed),
        "fail": "open" if fail_open else "closed",
    }


def printable(text: str, limit: int) -> str:
    """What a guard writes is untrusted: one line, printable characters, bounded."""
    return "".join(c if c.isprintable() else " " for c in text).strip()[:limit]


def free_name(text: str) -> str:
    """A category in the guard's own words, which whoever is judged can steer: as `printable`, and no address or markup in it."""
    plain = unicodedata.normalize("NFKC", printable(text, 4 * NAME_LIMIT))
    words = ("link" if _ADDRESS.search(word) and not _INITIALS.fullmatch(word) else word for word in plain.split())
    return " ".join("".join(" " if c in "<>[]{}|`\\" else c for c in " ".join(words)).split())[:NAME_LIMIT] or "unnamed"


def readable(verdict: dict) -> str:
    """A verdict for people."""
    lines = [f"--- {printable(str(verdict['id']), 80)}"] if "id" in verdict else []
    why = {"failure": " (no answer is in format: the guard fails closed)", "score": f" (score, from {verdict['threshold'] or 0:.3g})"}
    lines.append(f"verdict:  {'flagged' if verdict['flagged'] else 'passed'}{why.get(verdict['flagged_by'], '')}")
    for line in ("request", "response"):
        score = verdict["scores"][line]
        calibrated = "" if verdict["calibrated"] else ", not calibrated"
        sure = "" if score is None else f"  (unsafe: {score:.2f}{calibrated})"
        lines += [f"{line + ':':<9} {verdict[line]}{sure}"] if verdict[line] else []
    if verdict["category_id"]:
        lines.append(f"category: {verdict['category_id']} {verdict['category_name']}")
    elif verdict["category_name"]:
        lines.append(f"category: {verdict['category_name']} (its own words: not in the policy)")
    lines += [f"because:  {verdict['reasoning']}"] if verdict["reasoning"] else []
    return "\n".join(lines + (["(toy model: not a guard)"] if verdict["not_a_guard"] else []))
