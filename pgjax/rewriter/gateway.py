"""`pgjax serve --rewriter`: a proxy in OpenAI's shape between clients and a target model (docs/rewriter.md). It rewrites what users say,
sends it on, and hands the answer back; with a guard it also judges what goes on, and the answer before anything of it is handed back.

It fails closed: what was not rewritten, or not judged, is not sent on.
"""

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import httpx2
from prometheus_client import Counter, Histogram
from pydantic import RootModel
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pgjax.endpoint import data_url
from pgjax.rewriter import upstream
from pgjax.rewriter.rewriter import Rewriter, Rewritten
from pgjax.rewriter.turns import Turn, exchanged, text_of, user_turns
from pgjax.rewriter.upstream import Upstream
from pgjax.serving import chat
from pgjax.serving.app import ALWAYS, Endpoints
from pgjax.serving.border import log, refusal
from pgjax.serving.desk import Common, Desk, Serving, present
from pgjax.serving.engine import Ask
from pgjax.serving.guard import Guard
from pgjax.serving.metrics import SECONDS
from pgjax.serving.requests import Options, Refused, Said, parse, within
from pgjax.serving.service import Service

RECENT = 1024  # rewrites that are kept: a client sends the turns before the last one again
STOPPED = "This was stopped by a safety check."  # in place of an answer
STRENGTH = ("unchanged", "changed", "fallback")

Anything = RootModel[dict[str, Any]]


@dataclass
class Done:
    """What was done to a request, for the headers of its answer."""

    rewrite: Literal["changed", "unchanged", "fallback", "bypassed"] | None = None  # of several messages the strongest; None: not yet
    tokens: int = 0  # that the rewriter wrote
    seconds: float = 0.0
    guard: Literal["off", "passed", "request", "response"] = "off"  # the last two: what it flagged, or could not judge

    @property
    def headers(self) -> dict[str, str]:
        rewrite = {"x-pgjax-rewrite": self.rewrite} if self.rewrite else {}
        counts = {"x-pgjax-rewrite-tokens": str(self.tokens), "x-pgjax-rewrite-ms": str(round(1000 * self.seconds))}
        return rewrite | counts | {"x-pgjax-guard": self.guard}


class Gateway(Desk):
    """`serving` is for both models: its limits, and what the guard judges by; with `how.fail_open` the request goes on as it came where
    the rewriter's answer is a fallback. ValueError as `Service`, and where the rewriter's prompt has no room."""

    def __init__(self, rewriter: Rewriter, serving: Serving, target: Upstream, bypass: str | None = None, guard: Guard | None = None):
        self.rewriter, self.target, self.bypass = rewriter, target, bypass
        super().__init__(rewriter.model, serving)
        self.judge = Service(guard, serving, Common(self.metrics, self.texts, self.pictures)) if guard else None
        if guard:
            self.metrics.watch(guard.engine, "pgjax_guard")
        self.recent: OrderedDict[bytes, Rewritten] = OrderedDict()
        registry = self.metrics.registry
        self.rewrites = Counter("pgjax_rewrites", "User messages, by what the rewriter made of them", ["how"], registry=registry)
        self.rewriting = Histogram("pgjax_rewrite_seconds", "From a message to its rewrite", buckets=SECONDS, registry=registry)
        self.bypasses = Counter("pgjax_bypasses", "Requests sent on without rewriter and guard", registry=registry)
        self.statuses = Counter("pgjax_upstream", "The target's answers", ["status"], registry=registry)

    def hello(self) -> Ask:
        return self.rewriter.ask("Hello.", [])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.target.client, super().running():
            yield

    async def warm_up(self) -> None:
        await asyncio.gather(super().warm_up(), *([self.judge.warm_up()] if self.judge else []))

    def healthy(self) -> bool:
        return super().healthy() and (self.judge is None or self.judge.healthy())

    # --- rewriting -------------------------------------------------------------------------------------------------------------------

    async def rewritten(self, request: Request, said: Sequence[tuple[str, Sequence[bytes]]], deadline: float) -> list[Rewritten]:
        """Each of these texts with its pictures; they wait side by side."""
        began, keys = time.monotonic(), [await self.thread(partial(_digest, *one)) for one in said]
        new = {key: one for key, one in zip(keys, said, strict=True) if key not in self.recent}
        found = {key: self.recent[key]._replace(tokens=0) for key in keys if key not in new}
        async with self.until(deadline):
            asks = [await self.thread(partial(self.rewriter.ask, *one, deadline), one[1]) for one in new.values()]
            answers = await self.answers(request, self.submit(asks))
            for (key, (text, _)), [told] in zip(new.items(), answers, strict=True):
                found[key] = await self.texts.run(self.rewriter.read, text, told, time.monotonic() - began)
                self.rewriting.observe(found[key].seconds)
        for key in keys:
            self.recent[key] = found[key]
            self.recent.move_to_end(key)
            self.rewrites.labels(found[key].how).inc()
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)
        return [found[key] for key in keys]

    async def on_their_way(self, request: Request, messages: Any, deadline: float, done: Done) -> tuple[list[dict], Turn]:
        """The messages that the target gets, and the last turn as it gets it."""
        turns = user_turns(messages)
        said = [turn for turn in turns if turn.says]
        files, shown = await self.looked_at(turns, deadline)
        began, most, made = time.monotonic(), self.model.engine.queue, []
        for k in range(0, len(said), most):  # more at once would never be taken
            some = [(turn.text, [files[url] for url in turn.urls]) for turn in said[k : k + most]]
            made += await self.rewritten(request, some, deadline)
        done.rewrite = max((one.how for one in made), key=STRENGTH.index, default="unchanged")
        done.tokens, done.seconds = sum(one.tokens for one in made), time.monotonic() - began
        if done.rewrite == "fallback" and not self.serving.how.fail_open:
            raise Refused(502, "not_rewritten", "the request could not be rewritten and was not sent on; say it in other words")
        prompts = {turn.n: one.prompt for turn, one in zip(said, made, strict=True) if one.how == "changed"}
        last = turns[-1]
        sent = last._replace(text=prompts.get(last.n, last.text), urls=tuple(shown.get(url, url) for url in last.urls))
        return exchanged(messages, prompts, shown), sent

    async def looked_at(self, turns: Sequence[Turn], deadline: float) -> tuple[dict[str, bytes], dict[str, str]]:
        """By URL, the pictures' files; and of those that were fetched the URLs that the target gets: a host might give it another file."""
        urls = tuple(url for turn in turns for url in turn.own)
        within(Said("\n".join(turn.text for turn in turns), urls=urls), self.serving.limits)
        async with self.until(deadline):
            files = {url: (await self.images([url]))[0] for url in dict.fromkeys(urls)}
            fetched = {url: file for url, file in files.items() if url[:5].lower() != "data:"}
            return files, {url: await self.thread(partial(data_url, file)) for url, file in fetched.items()}

    # --- judging ---------------------------------------------------------------------------------------------------------------------

    async def flags(self, request: Request, messages: Sequence[dict], turn: Turn, answers: Sequence[str | None], deadline: float) -> bool:
        """Whether the guard flags the user's turn in its conversation (an answer is None), or any of the answers to it."""
        if self.judge is None or not answers:
            return False
        before = [(m["role"], text_of(m)) for m in messages[: turn.n] if m["role"] in ("user", "assistant")]
        turns = tuple((role, text) for role, text in before if text.strip())
        said = [within(Said(turn.text, answer, turn.urls, turns), self.serving.limits) for answer in answers]
        judged = await self.judge.verdicts(request, said, Options(), self.serving.how, deadline)
        return any(one.verdict["flagged"] for one in judged)

    # --- the target ------------------------------------------------------------------------------------------------------------------

    async def asked(self, request: Request, path: str, body: bytes | None, deadline: float, held: bool) -> tuple[httpx2.Response, bytes]:
        """The target's answer, and all of it; but of a stream that is not to be `held` back nothing has been read yet."""

        async def ask() -> tuple[httpx2.Response, bytes]:
            response = await self.target.open("GET" if body is None else "POST", path, body)
            self.statuses.labels(response.status_code).inc()
            if upstream.is_stream(response) and not held:
                return response, b""
            return response, await upstream.whole(response)

        async with self.until(deadline):
            return await present(request, ask())

    async def passed_on(self, response: httpx2.Response, deadline: float) -> AsyncIterator[bytes | str]:
        """A stream's lines as they come, whole ones, so that what breaks off in the midst of one can end in good order."""
        pieces, rest, ended = upstream.pieces(response), b"", False
        try:
            while True:
                async with self.until(deadline):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                *lines, rest = (rest + piece).split(b"\n")
                ended = ended or any(map(upstream.ends, lines))
                if lines:
                    yield b"\n".join(lines) + b"\n"
            if not (ended or upstream.ends(rest)):
                raise upstream.broken_off()
            if rest:
                yield rest
        except Refused as error:
            yield f"\n{chat.failure(error)}{chat.DONE}"
        finally:
            await response.aclose()


def _digest(text: str, images: Sequence[bytes]) -> bytes:
    parts = [text.encode(), *images]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


# --- routes --------------------------------------------------------------------------------------------------------------------------


async def complete(gateway: Gateway, request: Request) -> Response:
    done = Done()
    try:
        answer = await _completed(gateway, request, done)
    except Refused as error:
        answer = refusal(error, request.url.path, gateway.serving.how.fail_open)
    answer.headers.update(done.headers)
    return answer


async def _completed(gateway: Gateway, request: Request, done: Done) -> Response:
    bypassed = _bypasses(gateway, request)
    deadline = time.monotonic() + gateway.seconds(request)
    data: bytes | bytearray = await gateway.read(request, deadline)
    path, held = "/chat/completions", gateway.judge is not None and not bypassed
    if bypassed:
        done.rewrite = "bypassed"
        return await _handed_back(gateway, *await gateway.asked(request, path, bytes(data), deadline, held), deadline)
    async with gateway.until(deadline):
        body = (await gateway.thread(partial(parse, Anything, data, gateway.serving.limits))).root
    messages, turn = await gateway.on_their_way(request, body.get("messages"), deadline, done)
    done.guard = "request" if held else "off"
    if await gateway.flags(request, messages, turn, [None], deadline):
        return stopped(body)
    done.guard = "passed" if held else "off"
    sent = await gateway.thread(partial(_written, body | {"messages": messages}))
    response, answer = await gateway.asked(request, path, sent, deadline, held)
    if held and response.is_success:
        done.guard = "response"
        texts = [text for text in await gateway.thread(partial(upstream.said, response, answer)) if text]
        try:
            if await gateway.flags(request, messages, turn, texts, deadline):
                return stopped(body)
        except Refused as error:
            raise error if error.status != 400 else Refused(502, "not_judged", f"the answer is held back: {error.message}") from None
        done.guard = "passed"
    return await _handed_back(gateway, response, answer, deadline)


def _bypasses(gateway: Gateway, request: Request) -> bool:
    """Whether a request is to go on as it is; recorded."""
    given = request.headers.get("x-pgjax-bypass")
    if given is None:
        return False
    if gateway.bypass is None or not hmac.compare_digest(given.encode(), gateway.bypass.encode()):
        raise Refused(401, "invalid_bypass_key", "the key in X-Pgjax-Bypass is wrong, or this server takes none; leave the header out")
    gateway.bypasses.inc()
    log.warning("bypass: neither rewritten nor judged %s", request.state.name)
    return True


def _written(body: Mapping[str, Any]) -> bytes:
    """Always from what was read: of two keys of one name, a target might read the other."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise Refused(400, "invalid_json", "the body has a number that JSON has no form for") from None


async def _handed_back(gateway: Gateway, response: httpx2.Response, data: bytes, deadline: float) -> Response:
    """The target's answer, and its errors. A stream that was not held is read as it is handed back."""
    status = response.status_code
    if upstream.is_stream(response):
        if response.is_closed:
            return Response(data, status, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        left = BackgroundTask(response.aclose)  # whoever hung up before the first line
        stream = gateway.passed_on(response, deadline)
        return StreamingResponse(stream, status, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}, background=left)
    try:
        await gateway.texts.run(json.loads, data)
    except (ValueError, RecursionError):
        status = status if status >= 400 else 502
        raise Refused(status, "upstream_failed", f"the model's server answered {response.status_code}, and no JSON") from None
    again = {"Retry-After": response.headers["retry-after"]} if "retry-after" in response.headers else {}
    return Response(data, status, media_type="application/json", headers=again)


def stopped(body: Mapping[str, Any]) -> Response:
    """In place of an answer, whole or streamed."""
    stream = bool(body.get("stream"))
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.get("model")}
    message = {"role": "assistant", "content": STOPPED}
    choice = {"index": 0, "delta" if stream else "message": message, "logprobs": None, "finish_reason": "content_filter"}
    if stream:
        chunk = head | {"object": "chat.completion.chunk", "choices": [choice]}
        return Response(chat.event(chunk) + chat.DONE, media_type="text/event-stream")
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
    return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage})


async def models(gateway: Gateway, request: Request) -> Response:
    deadline = time.monotonic() + gateway.seconds(request)
    await gateway.read(request, deadline)
    return await _handed_back(gateway, *await gateway.asked(request, "/models", None, deadline, True), deadline)


ENDPOINTS: Endpoints = {("POST", "/v1/chat/completions"): complete, ("GET", "/v1/models"): models, **ALWAYS}
