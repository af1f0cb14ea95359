"""What a rewriter reads and writes: the request with its picture as chat messages, and the risk report with the new prompt as text.

The tags are ours: the paper does not state its own (PAPERS B4, B8).
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pgjax.conversation import neutralise

PROMPTS = Path(__file__).with_name("prompts")
_ANSWER = re.compile(
    r"<think>Text: (?P<text>.+?)\nImage: (?P<image>.+?)\nTogether: (?P<together>.+?)</think>\n<rewrite>(?P<prompt>.+?)</rewrite>", re.DOTALL
)

_SECTION = re.compile(r"<(?=\s*/?\s*(?:request|(?:safe_|unsafe_)?response|features|report)\s*>)", re.IGNORECASE)


class Report(BaseModel):
    """The risk report A of a request and its picture (PAPERS B2, stage 2); "none" where a part brings no risk."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)
    text: str = Field(min_length=1)  # which words
    image: str = Field(min_length=1)  # which visual elements
    together: str = Field(min_length=1)  # how the two act on each other


class Rewriting(NamedTuple):
    report: Report
    prompt: str  # x_T'


@cache
def template(name: str) -> str:
    """The packaged template NAME.txt."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")


def rewriter_messages(request: str, images: int) -> list[dict]:
    """The chat that a rewriter answers, in transformers' form, for training and use alike; the request is neutralised."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": neutralise(request)}]
    return [{"role": "system", "content": template("rewrite").strip()}, {"role": "user", "content": content}]


def section(name: str, text: str) -> str:
    """A text of somebody else's in a prompt of ours, neutralised, with tags that nothing in it can close or open."""
    return f"<{name}>\n{_SECTION.sub('‹', neutralise(text))}\n</{name}>"


def answer_of(rewriting: Rewriting) -> str:
    """The answer that says so. ValueError for a part that would not be read back as it is."""
    report, prompt = rewriting
    thoughts = f"Text: {report.text}\nImage: {report.image}\nTogether: {report.together}"
    answer = f"<think>{thoughts}</think>\n<rewrite>{prompt}</rewrite>"
    if parse_answer(answer) != rewriting:
        raise ValueError("a report or prompt has markup, breaks the lines of the answer's form, or begins or ends with a space")
    return answer


def parse_answer(text: str) -> Rewriting | None:
    """The report and the prompt in an answer; None where it is not in the form, to the last character."""
    found = _ANSWER.fullmatch(text.strip())
    if not found or any(re.search(r"</?(?:think|rewrite)>", part) for part in found.groups()):
        return None
    text, image, together, prompt = (part.strip() for part in found.groups())
    return Rewriting(Report(text=text, image=image, together=together), prompt) if all((text, image, together, prompt)) else None
