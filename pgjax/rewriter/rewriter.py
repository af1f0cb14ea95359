"""A trained rewriter in use: a request and its pictures in; out comes the prompt that a target is to get in its place (PAPERS B4)."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from pgjax.conversation import neutralise, neutralise_special
from pgjax.data.arrays import TooLong
from pgjax.data.schema import Example
from pgjax.rewriter.record import Report, parse_answer, rewriter_messages
from pgjax.serving.engine import Ask, Told
from pgjax.serving.model import Model
from pgjax.serving.verdict import REASONING_LIMIT, printable

GROWTH, ROOM = 4, 400  # a prompt of more than so many times the request's characters and so many more is no rewrite of it


class Rewritten(NamedTuple):
    prompt: str  # what to send on: where nothing was changed, and where it is a fallback, the request as it came
    report: Report | None  # written by a model that has read a stranger's text: untrusted, as the prompt is
    how: Literal["changed", "unchanged", "fallback"]  # the last: the answer cannot be taken as a rewrite
    tokens: int  # of the answer
    seconds: float

    def as_json(self) -> dict:
        return self._asdict() | {"report": self.report and self.report.model_dump()}

    def in_words(self) -> str:
        """For people. Both texts of it are a model's."""
        lines = [f"{part + ':':<9} {printable(said, REASONING_LIMIT)}" for part, said in (self.as_json()["report"] or {}).items()]
        why = " (the answer cannot be taken as a rewrite: this is the original prompt)" if self.how == "fallback" else ""
        return "\n".join([*lines, f"prompt:   {printable(self.prompt, len(self.prompt))}", f"how:      {self.how}{why}"])


class Rewriter(Model):
    def ask(self, request: str, images: Sequence[bytes], deadline: float | None = None) -> Ask:
        """What the engine is asked, greedily; `deadline` is a time.monotonic(). ValueError for a picture that cannot be read and for what
        does not fit the model's prompt."""
        messages = rewriter_messages(request, len(images))
        try:
            return self.chat(messages, self.shrunk(images), limit=self.recipe.answer.max_tokens, deadline=deadline)
        except TooLong as error:
            most, patches = self.engine.prompt_tokens, self.recipe.data.patches
            raise ValueError(
                f"the request takes {error.tokens} of the rewriter's {most} tokens and {error.slots} of its {patches} patches; "
                "shorten it, or give fewer pictures"
            ) from None

    def read(self, request: str, told: Told, seconds: float) -> Rewritten:
        return rewritten(request, self.text(told.tokens), len(told.tokens), seconds, self.tokenizer)

    def rewrite(self, request: str, images: Sequence[bytes]) -> Rewritten:
        """Waits for the answer. ValueError as `ask`."""
        began = time.monotonic()
        [told] = self.engine.submit(self.ask(request, images), wait=True).result()
        return self.read(request, told, time.monotonic() - began)

    def rewrites(self, examples: Iterable[Example]) -> Iterator[Rewritten]:
        """Of each example's request and pictures, in order; a few are on their way at a time. ValueError as `ask`, with the example's
        id."""
        flight: deque = deque()

        def first() -> Rewritten:
            request, began, future = flight.popleft()
            [told] = future.result()
            return self.read(request, told, time.monotonic() - began)

        for example in examples:
            request = example.request or ""
            try:
                flight.append((request, time.monotonic(), self.engine.submit(self.ask(request, example.images), wait=True)))
            except ValueError as error:
                raise ValueError(f"{example.id}: {error}") from error
            if len(flight) >= 2 * self.engine.rows:
                yield first()
        while flight:
            yield first()


def rewritten(request: str, answer: str, tokens: int, seconds: float, tokenizer) -> Rewritten:
    """An answer to a request. What does not parse, is far longer than the request, or holds one of the tokenizer's special tokens is a
    fallback: whoever wrote the request or the picture may have talked the rewriter into anything."""
    parsed = parse_answer(answer)
    if parsed is None or len(parsed.prompt) > GROWTH * len(request) + ROOM or neutralise_special(parsed.prompt, tokenizer) != parsed.prompt:
        return Rewritten(request, None, "fallback", tokens, seconds)
    same = parsed.prompt.split() == neutralise_special(neutralise(request), tokenizer).split()
    return Rewritten(request if same else parsed.prompt, parsed.report, "unchanged" if same else "changed", tokens, seconds)
