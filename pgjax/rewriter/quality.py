"""One item through the three stages and through quality control, whose rules are ours: the paper states none (PAPERS B2, B8).

An answer of the analyst or the judge that is wrong goes back once: whoever wrote it is told what is wrong with it and asked again, in the
same chat. What is wrong then too is out, and so is the item.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import BaseModel

from pgjax.conversation import neutralise
from pgjax.data.images import load_image
from pgjax.data.sources.items import Item
from pgjax.endpoint import Endpoint, Failed, user
from pgjax.rewriter.judge import ANSWER_TOKENS, Grade, R, Unparsed, grading, read_record
from pgjax.rewriter.record import Report, Rewriting, answer_of, template
from pgjax.rewriter.stages import Features, Rewrite, causal, hindsight, optimise

TOKENS = 1024  # of an answer of the analyst or the target
GROWTH, ROOM = 3, 400  # a rewrite may have so many times the request's characters, and so many more
PART = 600  # characters of each part of a report
QUOTE = 8  # words in a row: so many of an elicited answer may not come back

SAFE_ALREADY = "elicit: the answer is safe"  # a reason that says nothing of the analyst

Outcome = Literal["accepted", "rejected", "failed"]


class Ends(NamedTuple):
    analyst: Endpoint
    target: Endpoint
    judge: Endpoint
    elicits: Endpoint | None = None  # who is asked for unsafe answers, without a cache


class Wrong(Exception):
    """`reason` is counted, `complaint` told to whoever was wrong."""

    def __init__(self, reason: str, complaint: str):
        super().__init__(reason)
        self.reason, self.complaint = reason, complaint


class Out(Exception):
    """Says in a few words, to be counted, why an item is left out."""


class Made(NamedTuple):
    """What became of an item. An item that failed had a call without an answer; nothing is known against it."""

    outcome: Outcome
    reason: str  # "" where it was accepted
    rewriting: Rewriting | None
    grade: Grade | None  # of the target's answer to the last rewrite
    attempts: list[dict]  # who answered what, in turn


async def make(item: Item, ends: Ends, min_safety: int) -> Made:
    making = _Making(item, ends, min_safety)
    made = Made("accepted", "", None, None, making.attempts)
    try:
        made = made._replace(rewriting=await making.rewriting())
    except Out as error:
        made = made._replace(outcome="rejected", reason=str(error))
    except Failed as error:
        made = made._replace(outcome="failed", reason=f"{making.stage}: {error.kind}")
    return made._replace(grade=making.grade)


def version(name: str) -> str:
    """Of a template."""
    return hashlib.sha256(template(name).encode()).hexdigest()


async def _anything(record: BaseModel) -> None:
    pass


@dataclass
class _Making:
    item: Item
    ends: Ends
    min_safety: int
    stage: str = ""  # that was asked last
    grade: Grade | None = None
    attempts: list[dict] = field(default_factory=list)

    @property
    def request(self) -> str:
        """As the analyst and the rewriter see it."""
        return neutralise(self.item.example.request or "").strip()

    @property
    def benign(self) -> bool:
        return self.item.example.request_label == "safe"

    async def rewriting(self) -> Rewriting:
        """Raises Out and Failed."""
        for image in self.item.example.images:
            try:
                load_image(image)
            except ValueError:
                raise Out("the picture cannot be read") from None
        features = Features(features=[]) if self.benign else await self._features()
        report = await self._asked("causal", causal(self.item, features), Report, self._check_report)
        rewrite = await self._asked("optimise", optimise(self.item, report), Rewrite, lambda one: self._check_rewrite(report, one))
        return Rewriting(report, self.request if self.benign else rewrite.prompt)

    # --- asking ----------------------------------------------------------------------------------------------------------------------

    async def _ask(
        self, stage: str, endpoint: Endpoint, messages: list[dict], secret: bool = False, tokens: int = TOKENS
    ) -> tuple[str, dict]:
        """An answer, and its entry in `attempts` (str, dict); of what is `secret` that has a hash alone."""
        self.stage = stage
        text = (await endpoint.ask(messages, max_tokens=tokens)).text
        kept = {"sha256": hashlib.sha256(text.encode()).hexdigest()} if secret else {"answer": text}
        self.attempts.append({"stage": stage, "endpoint": endpoint.name, **kept})
        return text, self.attempts[-1]

    async def _asked(
        self, stage: str, messages: list[dict], kind: type[R], check: Callable[[R], Awaitable[None]] = _anything, secret: bool = False
    ) -> R:
        """The record that a template asks for, if need be at the second time."""
        endpoint, tokens = (self.ends.judge, ANSWER_TOKENS) if stage == "judge" else (self.ends.analyst, TOKENS)
        for last in (False, True):
            text, attempt = await self._ask(stage, endpoint, messages, secret, tokens)
            attempt |= {"template": version(stage), "parsed": False, "complaint": None}
            try:
                record = read_record(text, kind)
                attempt["parsed"] = True
                await check(record)
                return record
            except Unparsed as error:
                wrong = Wrong("not in the form", f"That is not the JSON object that was asked for ({error}). Give it, and nothing else.")
            except Wrong as error:
                wrong = error
            attempt["complaint"] = wrong.complaint
            if last:
                raise Out(f"{stage}: {wrong.reason}")
            messages = [*messages, {"role": "assistant", "content": text}, user(wrong.complaint)]
        raise AssertionError("the last time returns or raises")

    # --- the stages ------------------------------------------------------------------------------------------------------------------

    async def _features(self) -> Features:
        elicited = self.item.unsafe is None
        item = self.item._replace(unsafe=await self._elicit()) if elicited else self.item

        async def check(record: Features) -> None:
            if not record.features:
                raise Wrong("no features", "One of the answers is unsafe, so something in the request or the picture makes it so. Name it.")
            said = " ".join(feature.evidence for feature in record.features)
            if elicited and _runs(said) & _runs(item.unsafe or "") - _runs(self.request):
                raise Wrong("quotes", "Describe the unsafe answer; repeat nothing of it.")

        return await self._asked("hindsight", hindsight(item), Features, check, secret=elicited)

    async def _elicit(self) -> str:
        """An unsafe answer of the target's own. No file and no message has it."""
        assert self.ends.elicits  # or the item would not have been taken
        example = self.item.example
        answer, attempt = await self._ask("elicit", self.ends.elicits, [user(example.request or "", example.images)], secret=True)
        grade = await self._asked("judge", grading(example.request or "", example.images, answer), Grade, secret=True)
        attempt["grade"] = grade.model_dump(include={"safety", "helpful"})
        if grade.safety >= self.min_safety:
            raise Out(SAFE_ALREADY)
        return answer

    async def _check_report(self, report: Report) -> None:
        if max(len(part) for part in report.model_dump().values()) > PART:
            raise Wrong("too long", f"Each part may have {PART} characters at most.")
        _check_markup(Rewriting(report, "-"))

    async def _check_rewrite(self, report: Report, rewrite: Rewrite) -> None:
        """The form first, then what the target makes of it."""
        prompt, most = rewrite.prompt, GROWTH * len(self.request) + ROOM
        same = prompt.split() == self.request.split()
        if self.benign and not same:
            raise Wrong("changed", "The request is harmless: give back the user's words, exactly.")
        if same and not self.benign:
            raise Wrong("unchanged", "Those are the user's words. Take out or turn round what the harm comes from.")
        if len(prompt) > most:
            raise Wrong("too long", f"The prompt may have {most} characters at most.")
        _check_markup(Rewriting(report, prompt))
        request, images = self.item.example.request or "", self.item.example.images
        answer, _ = await self._ask("target", self.ends.target, [user(prompt, images)])
        self.grade = await self._asked("judge", grading(request, images, answer), Grade)
        if self.grade.safety < self.min_safety:
            raise Wrong("unsafe answer", "An assistant answered that prompt, and its answer was not safe. Keep further away from the harm.")
        if not self.grade.helpful:
            raise Wrong("no help", "An assistant answered that prompt, and its answer was no help. Ask for something useful that is safe.")


def _check_markup(rewriting: Rewriting) -> None:
    said = "\n".join((*rewriting.report.model_dump().values(), rewriting.prompt))
    try:
        answer_of(rewriting)
        plain = neutralise(said) == said
    except ValueError:
        plain = False
    if not plain:
        raise Wrong(
            "markup", "Write plain sentences: no tags, no control characters, no line that begins like a part of the report or a turn."
        )


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[n : n + QUOTE]) for n in range(len(words) - QUOTE + 1)}
