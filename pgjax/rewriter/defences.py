"""What can be put in front of a target, or around it, so that it answers safely. A target is asked greedily, with the picture as it is."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from pgjax.endpoint import Endpoint, Reply, system, user
from pgjax.files import read_json, replace_file
from pgjax.rewriter.record import template
from pgjax.rewriter.rewriter import Rewriter, Rewritten

ANSWER_TOKENS = 1024
ECSO_CUT = 1927  # characters of an answer that ECSO asks about

How = Literal["changed", "unchanged", "fallback"]


class Answered(NamedTuple):
    """What the user gets, and what it took beside the call of the target that gave it."""

    text: str
    prompt: str  # the request as the target answered it
    how: How | None  # None: this defence never changes the request
    calls: int
    added_tokens: int | None  # written in the other calls; None where an endpoint does not say
    seconds: float  # of all calls, one after the other
    target_seconds: float  # of the call that gave the answer


Defence = Callable[[Endpoint, str, Sequence[bytes]], Awaitable[Answered]]


async def ask(target: Endpoint, *messages: dict) -> Reply:
    return await target.ask(list(messages), max_tokens=ANSWER_TOKENS)


def answered(reply: Reply, prompt: str, how: How | None = None, others: Sequence[Reply] = ()) -> Answered:
    tokens = [other.tokens for other in others]
    added = None if None in tokens else sum(n or 0 for n in tokens)
    return Answered(reply.text, prompt, how, 1 + len(others), added, sum(r.seconds for r in (reply, *others)), reply.seconds)


async def none(target: Endpoint, request: str, images: Sequence[bytes]) -> Answered:
    return answered(await ask(target, user(request, images)), request)


async def defensive(target: Endpoint, request: str, images: Sequence[bytes]) -> Answered:
    """A fixed system prompt."""
    return answered(await ask(target, system(template("defensive").strip()), user(request, images)), request)


async def ecso(target: Endpoint, request: str, images: Sequence[bytes]) -> Answered:
    """Eyes Closed, Safety On (PAPERS D1): where the target itself calls its answer harmful, it answers anew, without the picture but with
    a description of it. A request without a picture is answered directly: there is nothing to close one's eyes to (our choice)."""
    filled = lambda name, **parts: template(name).strip().format(request=request, **parts)  # noqa: E731
    first = await ask(target, user(request, images))
    if not images:
        return answered(first, request, "unchanged")
    harm = await ask(target, user(filled("ecso_harm", response=first.text[:ECSO_CUT]), images))
    if harm.text.strip().lower() not in ("yes", "yes."):
        return answered(first, request, "unchanged", [harm])
    seen = await ask(target, user(filled("ecso_describe"), images))
    prompt = filled("ecso_answer", description=seen.text)
    return answered(await ask(target, user(prompt)), prompt, "changed", [first, harm, seen])


def rewriting(rewriter: Rewriter, kept: Path, identity: str) -> Defence:
    """The request as the rewriter words it. Rewrites are kept in the folder `kept`, under a name made from `identity`, which says what
    the rewriter is, and what it read."""
    kept.mkdir(parents=True, exist_ok=True)

    def rewrite(request: str, images: Sequence[bytes]) -> Rewritten:
        asked = json.dumps([identity, request, [hashlib.sha256(image).hexdigest() for image in images]])
        file = kept / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        try:
            return _REWRITTEN.validate_python(read_json(file))
        except ValueError:  # absent, or broken
            made = rewriter.rewrite(request, images)
        replace_file(file, json.dumps(made.as_json()))
        return made

    async def defence(target: Endpoint, request: str, images: Sequence[bytes]) -> Answered:
        made = await asyncio.to_thread(rewrite, request, images)
        reply = await ask(target, user(made.prompt, images))
        return Answered(reply.text, made.prompt, made.how, 2, made.tokens, made.seconds + reply.seconds, reply.seconds)

    return defence


_REWRITTEN = TypeAdapter(Rewritten)
BASELINES: dict[str, Defence] = {"none": none, "defensive": defensive, "ecso": ecso}
REWRITER = "rewriter"
DEFENCES = (*BASELINES, REWRITER)  # in the order in which they run: what one needs of an earlier one's answers is kept already
