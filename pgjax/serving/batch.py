"""`pgjax moderate --jsonl IN --out OUT`: many rows through one engine, that goes on where it was killed.

OUT/verdicts.jsonl has a line for each row that was judged, in their order; OUT/errors.jsonl one for each that could
not be, and why. A line names its row by its number in IN. OUT/job.json says what both were made from.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from pgjax.data.jsonl import Line
from pgjax.data.rows import conversation_of
from pgjax.data.schema import Example
from pgjax.files import read_json, replace_file
from pgjax.serving.guard import Case, Guard, How, Policy
from pgjax.train.progress import Progress

VERDICTS, ERRORS, JOB = "verdicts.jsonl", "errors.jsonl", "job.json"


def moderate_rows(guard: Guard, lines: Sequence[Line], policy: Policy, how: How, out: Path, job: dict[str, Any]) -> dict[str, int]:
    """Judges the rows that OUT lacks; counts of all that it has then. ValueError where OUT holds another `job`."""
    out.mkdir(parents=True, exist_ok=True)
    job |= {"how": dataclasses.asdict(how), "rows": _digest(lines)}
    if (out / JOB).exists():
        if changed := sorted(key for key, value in read_json(out / JOB).items() if value != json.loads(json.dumps(job)).get(key)):
            raise ValueError(f"{out} holds a job with other {', '.join(changed)}; give another --out, or remove it")
    else:
        replace_file(out / JOB, json.dumps(job, indent=1) + "\n")
    done = {name: _done(out / name) for name in (VERDICTS, ERRORS)}
    seen = done[VERDICTS] | done[ERRORS]
    todo = [line for line in lines if line.number not in seen]
    tokens, began = guard.engine.counts.tokens, time.monotonic()
    with open(out / VERDICTS, "a") as verdicts, open(out / ERRORS, "a") as errors, Progress("moderate", len(lines), len(seen)) as progress:
        for line, case in zip(todo, guard.judge(map(_row, todo), policy, how), strict=True):
            if isinstance(case, Case):
                _write(verdicts, line, guard.verdict(case))
            else:
                _write(errors, line, {"error": str(case)})
            done[VERDICTS if isinstance(case, Case) else ERRORS].add(line.number)
            finished, spent = len(done[VERDICTS]) + len(done[ERRORS]), time.monotonic() - began
            rates = {"rows/s": (finished - len(seen)) / spent, "tokens/s": (guard.engine.counts.tokens - tokens) / spent}
            progress.update(finished, **rates, errors=len(done[ERRORS]))
    return {"rows": len(lines), "judged": len(done[VERDICTS]), "errors": len(done[ERRORS])}


def _row(line: Line) -> tuple[Example, None] | ValueError:
    try:
        return conversation_of(line), None
    except ValueError as error:
        return error


def _write(file: TextIO, line: Line, row: dict) -> None:
    file.write(json.dumps({"line": line.number, "id": line.row.get("id", line.number)} | row) + "\n")
    file.flush()


def _done(file: Path) -> set[int]:
    """Numbers of the rows in a file of ours; a last line that a kill cut off is removed."""
    if not file.exists():
        return set()
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        replace_file(file, whole)
    return {json.loads(line)["line"] for line in whole.splitlines()}


def _digest(lines: Sequence[Line]) -> str:
    return hashlib.sha256(json.dumps([(line.number, line.row) for line in lines], sort_keys=True).encode()).hexdigest()
