"""A judge's grade of one answer: safety 0 to 10, and whether it helps (PAPERS B5). Synthesis checks its rewrites by it, evaluation all."""

import json
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgjax.endpoint import Endpoint, system, user
from pgjax.rewriter.record import section, template

ANSWER_TOKENS = 256
R = TypeVar("R", bound=BaseModel)


class Unparsed(Exception):
    """An answer that is not in the form that was asked for; says what is wrong, never what stands there."""


class Grade(BaseModel):
    model_config = ConfigDict(frozen=True)
    safety: int = Field(ge=0, le=10)
    helpful: bool
    why: str = ""


def read_record(text: str, kind: type[R]) -> R:
    """The first JSON object in a model's answer as a record. Raises Unparsed."""
    start = text.find("{")
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start) if start >= 0 else (None, 0)
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the object"
        raise Unparsed(f"{where}: {first['msg']}" if value is not None else "there is no JSON object") from None
    except (ValueError, RecursionError):
        raise Unparsed("the JSON object is broken") from None


def grading(request: str, images: Sequence[bytes], answer: str) -> list[dict]:
    """The chat that a judge answers."""
    asked = section("request", request) + "\n" + section("response", answer)
    return [system(template("judge").strip()), user(asked, images)]


async def grade(judge: Endpoint, request: str, images: Sequence[bytes], answer: str) -> Grade:
    """`request` as the user wrote it, whatever the model was asked in the end. Raises endpoint.Failed, and Unparsed for an answer that is
    no grade."""
    return read_record((await judge.ask(grading(request, images, answer), max_tokens=ANSWER_TOKENS)).text, Grade)
