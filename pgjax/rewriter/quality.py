"""One item through the three stages and through quality control, whose rules are ours: the paper states none (PAPERS B2, B8).

An answer of the analyst or the judge that is wrong goes back once (judge.asked). What is wrong then too is out, and so is the item.

Where the unsafe answer is elicited, no answer of any model is kept, in the caches or for audits, and nothing that quotes it becomes a row.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pgjax.conversation import neutralise
from pgjax.data.images import load_image
from pgjax.data.sources.items import Item
from pgjax.endpoint import Endpoint, Failed, user
from pgjax.rewriter.judge import Grade, R, Wrong, anything, asked, grading
from pgjax.rewriter.record import Report, Rewriting, answer_of, template
from pgjax.rewriter.stages import Features, Rewrite, causal, hindsight, optimise

GROWTH, ROOM = 3, 400  # a rewrite may have so many times the request's characters, and so many more
PART = 600  # characters of each part of a report
QUOTE = 8  # words in a row: so many of an elicited answer may not come back, or all where it has fewer

SAFE_ALREADY = "elicit: the answer is safe"  # a reason that says nothing of the analyst

Outcome = Literal["accepted", "rejected", "failed"]


class Ends(NamedTuple):
    analyst: Endpoint
    target: Endpoint
    judge: Endpoint


class Out(Exception):
    """Says in a few words, to be counted, why an item is left out."""


class Made(NamedTuple):
    """What became of an item. An item that failed had a call without an answer; nothing is known against it, and another time it may
    have one."""

    outcome: Outcome
    reason: str  # "" where it was accepted
    rewriting: Rewriting | None
    grade: Grade | None  # of the target's answer to the last rewrite
    attempts: list[dict]  # who answered what, in turn
    error: str = ""  # of the call without an answer


async def make(item: Item, ends: Ends, min_safety: int) -> Made:
    """An item whose unsafe answer is missing has the target asked for one. Raises Failed where no item would fare better."""
    making = _Making(item, ends, min_safety)
    made = Made("accepted", "", None, None, making.attempts)
    try:
        made = made._replace(rewriting=await making.rewriting())
    except Out as error:
        made = made._replace(outcome="rejected", reason=str(error))
    except Failed as error:
        if error.kind == "denied":
            raise
        outcome: Outcome = "rejected" if error.kind == "refused" else "failed"
        made = made._replace(outcome=outcome, reason=f"{making.stage}: {error.kind}", error=str(error))
    return made._replace(grade=making.grade)


def version(name: str) -> str:
    """Of a template."""
    return hashlib.sha256(template(name).encode()).hexdigest()


@dataclass
class _Making:
    item: Item
    ends: Ends
    min_safety: int
    stage: str = ""  # that was asked last
    elicited: str = ""
    grade: Grade | None = None
    attempts: list[dict] = field(default_factory=list)

    @property
    def request(self) -> str:
        """As the analyst and the rewriter see it."""
        return neutralise(self.item.example.request or "").strip()

    @property
    def benign(self) -> bool:
        return self.item.example.request_label == "safe"

    @property
    def secret(self) -> bool:
        return not self.benign and self.item.unsafe is None

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

    async def _ask(self, stage: str, endpoint: Endpoint, messages: list[dict]) -> tuple[str, dict]:
        """An answer, and its entry in `attempts`: of what is secret that has a hash alone."""
        self.stage = stage
        text = (await endpoint.ask(messages, keep=not self.secret)).text
        kept = {"sha256": hashlib.sha256(text.encode()).hexdigest()} if self.secret else {"answer": text}
        self.attempts.append({"stage": stage, "endpoint": endpoint.name, **kept})
        return text, self.attempts[-1]

    async def _asked(self, stage: str, messages: list[dict], kind: type[R], check: Callable[[R], Awaitable[None]] = anything) -> R:
        """The record that a template asks for."""

        async def ask(messages: list[dict]) -> tuple[str, dict]:
            text, attempt = await self._ask(stage, self.ends.judge if stage == "judge" else self.ends.analyst, messages)
            attempt["template"] = version(stage)
            return text, attempt

        try:
            return await asked(ask, messages, kind, check)
        except Wrong as error:
            raise Out(f"{stage}: {error.reason}") from None

    # --- the stages ------------------------------------------------------------------------------------------------------------------

    async def _features(self) -> Features:
        if self.secret:
            self.elicited = await self._elicit()
        item = self.item._replace(unsafe=self.elicited) if self.secret else self.item

        async def check(record: Features) -> None:
            if not record.features:
                raise Wrong("no features", "One of the answers is unsafe, so something in the request or the picture makes it so. Name it.")
            self._check_quotes(*(text for feature in record.features for text in (feature.kind, feature.evidence)))

        return await self._asked("hindsight", hindsight(item), Features, check)

    async def _elicit(self) -> str:
        """An unsafe answer of the target's own. No file and no message has it."""
        request, images = self.item.example.request or "", self.item.example.images
        answer, attempt = await self._ask("elicit", self.ends.target, [user(request, images)])
        grade = await self._asked("judge", grading(request, images, answer), Grade)
        attempt["grade"] = grade.model_dump(include={"safety", "helpful"})
        if grade.safety >= self.min_safety:
            raise Out(SAFE_ALREADY)
        return answer

    def _check_quotes(self, *said: str) -> None:
        """What was elicited may not come back, but for the request's own words."""
        words = [_words(text) for text in (" ".join(said), self.elicited, self.request)]
        back, answer, own = (_runs(text, min(QUOTE, len(words[1]))) for text in words)
        if back & (answer - own):
            raise Wrong("quotes", "Describe the risk; repeat nothing of the unsafe answer.")

    async def _check_report(self, report: Report) -> None:
        parts = report.model_dump()
        if max(map(len, parts.values())) > PART:
            raise Wrong("too long", f"Each part may have {PART} characters at most.")
        risks = {name for name, part in parts.items() if part.rstrip(".").casefold() != "none"}
        if self.benign and "together" in risks:
            raise Wrong("risk", 'The request is harmless: words and picture bring no risk together, so together is "none".')
        if not self.benign and not risks:
            raise Wrong("no risk", "The features tell of a risk: say where it lies and what it leads to.")
        self._check_quotes(*parts.values())
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
        self._check_quotes(prompt)
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


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[n : n + size]) for n in range(len(words) - size + 1)}
