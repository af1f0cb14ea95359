"""Records that models are asked for, a judge's grade of one answer among them: safety 0 to 10, and whether it helps (PAPERS B5). Synthesis
checks its rewrites by it, evaluation all.
"""

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgjax.endpoint import system, user
from pgjax.rewriter.record import section, template

R = TypeVar("R", bound=BaseModel)


class Wrong(Exception):
    """An answer that goes back. `reason` is counted, `complaint` told to whoever gave it; neither says what stands there."""

    def __init__(self, reason: str, complaint: str):
        super().__init__(reason)
        self.reason, self.complaint = reason, complaint


class Unparsed(Wrong):
    """An answer that is not in the form that was asked for."""

    def __init__(self, what: str):
        super().__init__("not in the form", f"That is not the JSON object that was asked for ({what}). Give it, and nothing else.")
        self.args = (what,)


class Grade(BaseModel):
    model_config = ConfigDict(frozen=True)
    safety: int = Field(ge=0, le=10)
    helpful: bool
    why: str | None = None


def read_record(text: str, kind: type[R]) -> R:
    """The last JSON object in a model's answer that is such a record: models think aloud before. Raises Unparsed."""
    record, wrong, start = None, "there is no JSON object", text.find("{")
    while start >= 0:
        end = start + 1
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
            record = kind.model_validate(value)
        except ValidationError as error:
            wrong = _first_error(error)
        except ValueError:
            wrong = "the JSON object is broken"
        except RecursionError:  # nor would what lies within end soon
            wrong, end = "the JSON object is broken", len(text)
        start = text.find("{", end)
    if record is None:
        raise Unparsed(wrong)
    return record


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "extra_forbidden":  # the model's own word is where
        return "the JSON object has a key too many"
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


async def anything(record: BaseModel) -> None:
    """A check that finds nothing wrong."""


async def asked(
    ask: Callable[[list[dict]], Awaitable[tuple[str, dict]]],
    messages: list[dict],
    kind: type[R],
    check: Callable[[R], Awaitable[None]] = anything,
) -> R:
    """The record that the messages ask for. An answer that is wrong goes back once: whoever gave it is told what is wrong with it and asked
    again, in the same chat. `ask` returns an answer and an entry about it, to which `complaint` is added; `check` raises Wrong. Raises what
    `ask` does, and Wrong at the second time."""
    for last in (False, True):
        text, entry = await ask(messages)
        entry["complaint"] = None
        try:
            record = read_record(text, kind)
            await check(record)
            return record
        except Wrong as error:
            entry["complaint"] = error.complaint
            if last:
                raise
            messages = [*messages, {"role": "assistant", "content": text}, user(error.complaint)]
    raise AssertionError("the last time returns or raises")


def grading(request: str, images: Sequence[bytes], answer: str) -> list[dict]:
    """The chat that a judge answers by a Grade. `request` as the user wrote it, whatever the model was asked in the end."""
    told = section("request", request) + "\n" + section("response", answer)
    return [system(template("judge").strip()), user(told, images)]
