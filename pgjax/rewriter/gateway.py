"""`pgjax serve --rewriter`: a proxy in OpenAI's shape between clients and a target model (docs/rewriter.md). It rewrites what users say,
sends it on, and hands the answer back; with a guard it also judges what goes on, and the answer before anything of it is handed back.

It fails closed: what was not rewritten, or not judged, is not sent on.
"""

import asyncio
import hashlib
import hmac
import json
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import httpx2
from prometheus_client import Counter, Histogram
from pydantic import RootModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pgjax.data.images import plain
from pgjax.endpoint import data_url
from pgjax.rewriter import upstream
from pgjax.rewriter.rewriter import Rewriter, Rewritten
from pgjax.rewriter.turns import Turn, exchanged, read_turns
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
ROOM = 256  # requests under way: most of their time they wait for the target
GRACE = 5.0  # seconds after its deadline that a stream has for its last words
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
    flagged: bool = False

    @property
    def headers(self) -> dict[str, str]:
        rewrite = {"x-pgjax-rewrite": self.rewrite} if self.rewrite else {}
        counts = {"x-pgjax-rewrite-tokens": str(self.tokens), "x-pgjax-rewrite-ms": str(round(1000 * self.seconds))}
        return rewrite | counts | {"x-pgjax-guard": self.guard}


class Pictures(NamedTuple):
    """Of a turn, as the rewriter gets them."""

    files: tuple[bytes, ...]
    digest: bytes


class Gateway(Desk):
    """`serving` is for both models: its limits, and what the guard judges by; with `how.fail_open` the request goes on as it came where
    the rewriter's answer is a fallback. ROOM requests may be under way, however few rows there are: a stream keeps its place as long as
    the target writes. ValueError as `Service`, and where the rewriter's prompt has no room."""

    def __init__(self, rewriter: Rewriter, serving: Serving, target: Upstream, bypass: str | None = None, guard: Guard | None = None):
        self.rewriter, self.target, self.bypass = rewriter, target, bypass
        super().__init__(rewriter, serving)
        self.judge = Service(guard, serving, Common(self.metrics, self.texts, self.pictures)) if guard else None
        if guard:
            self.metrics.watch(guard.engine, "pgjax_guard")
        self.recent: OrderedDict[bytes, Rewritten] = OrderedDict()
        registry = self.metrics.registry
        self.rewrites = Counter("pgjax_rewrites", "User messages, by what the rewriter made of them", ["how"], registry=registry)
        self.rewriting = Histogram("pgjax_rewrite_seconds", "From a message to its rewrite", buckets=SECONDS, registry=registry)
        self.guarded = Counter("pgjax_guarded", "Requests, by the guard's word: passed, a side, not_judged", ["outcome"], registry=registry)
        self.bypasses = Counter("pgjax_bypasses", "Requests sent on without rewriter and guard", registry=registry)
        self.statuses = Counter("pgjax_upstream", "The target's answers", ["status"], registry=registry)

    @property
    def room(self) -> int:
        return ROOM

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

    async def rewritten(self, request: Request, said: Sequence[tuple[str, Pictures]], deadline: float) -> list[Rewritten]:
        """Each of these texts with its pictures; they wait side by side."""
        began, keys = time.monotonic(), [hashlib.sha256(shown.digest + text.encode()).digest() for text, shown in said]
        new = {key: one for key, one in zip(keys, said, strict=True) if key not in self.recent}
        found = {key: self.recent[key] for key in keys if key not in new}
        ask = lambda text, files: self.thread(partial(self.rewriter.ask, text, files, deadline), files)  # noqa: E731
        asks = [await ask(text, shown.files) for text, shown in new.values()]
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

    async def on_their_way(self, request: Request, body: Mapping[str, Any], deadline: float, done: Done) -> tuple[bytes, Said]:
        """What the target gets, and what the guard judges of it: what the user said last, and all other texts as earlier turns."""
        turns = await self.thread(partial(read_turns, body, self.serving.limits))
        asked = [turn for turn in turns if turn.asks]
        pictures, shown = await self.looked_at(asked)
        began, most, made = time.monotonic(), self.model.engine.queue, []
        for k in range(0, len(asked), most):  # more at once would never be taken
            some = [(turn.text, pictures[turn.urls]) for turn in asked[k : k + most]]
            made += await self.rewritten(request, some, deadline)
        done.rewrite = max((one.how for one in made), key=STRENGTH.index)
        done.tokens, done.seconds = sum(one.tokens for one in made), time.monotonic() - began
        if done.rewrite == "fallback" and not self.serving.how.fail_open:
            raise Refused(422, "not_rewritten", "the request could not be rewritten and was not sent on; say it in other words")
        prompts = {turn.n: one.prompt for turn, one in zip(asked, made, strict=True) if one.how == "changed"}
        texts = [prompts.get(turn.n, turn.text) for turn in turns]
        others = [(turn.role, text) for turn, text in zip(turns, texts, strict=True) if turn is not asked[-1] and text.strip()]
        earlier = tuple(("assistant" if role == "assistant" else "user", text) for role, text in others)
        said = Said(texts[asked[-1].n], None, tuple(shown.get(url, url) for url in asked[-1].urls), earlier)
        return await self.thread(partial(_written, body, prompts, shown)), said

    async def looked_at(self, turns: Sequence[Turn]) -> tuple[dict[tuple[str, ...], Pictures], dict[str, str]]:
        """The pictures of each turn, by their URLs. And where the target gets another URL, which: a host might give it another file, and
        it might read a file that is not plain in another way."""
        files, shown = {}, {}
        for url in dict.fromkeys(url for turn in turns for url in turn.own):
            [file] = await self.images([url])
            files[url] = await self.thread(partial(plain, file), [file])
            if files[url] is not file or url[:5].lower() != "data:":
                shown[url] = await self.thread(partial(data_url, files[url]))
        small = lambda urls: self.model.shrunk([files[url] for url in urls])  # noqa: E731
        pictures = {}
        for urls in {turn.urls for turn in turns}:
            some = await self.thread(partial(small, urls), [files[url] for url in urls])
            pictures[urls] = Pictures(some, await self.thread(partial(_digest, some)))
        return pictures, shown

    # --- judging ---------------------------------------------------------------------------------------------------------------------

    async def flags(self, request: Request, said: Sequence[Said], deadline: float) -> bool:
        """Whether the guard flags any of these."""
        assert self.judge
        most, limits = self.judge.model.engine.queue, self.serving.limits
        judged = []
        for k in range(0, len(said), most):  # more at once would never be taken
            some = [within(one, limits) for one in said[k : k + most]]
            judged += await self.judge.verdicts(request, some, Options(), self.serving.how, deadline)
        return any(one.verdict["flagged"] for one in judged)

    # --- the target ------------------------------------------------------------------------------------------------------------------

    async def asked(self, request: Request, path: str, body: bytes | None = None) -> httpx2.Response:
        """The target's answer, of which nothing has been read yet."""
        response = await present(request, self.target.open("GET" if body is None else "POST", path, body))
        self.statuses.labels(response.status_code).inc()
        if response.status_code in (401, 403, 407):  # what it says may repeat the key
            await response.aclose()
            log.error("the model's server does not let this one in: %d %s", response.status_code, request.state.name)
            raise Refused(502, "upstream_refused", "the model's server does not let this one in; tell who runs it")
        return response

    async def passed_on(self, response: httpx2.Response, deadline: float) -> AsyncIterator[bytes | str]:
        """A stream as it comes, whole lines, so that what breaks off in the midst of one can end in good order. What follows its last line
        is not waited for."""
        blocks, ended = upstream.blocks(response), False
        try:
            while not ended:
                async with self.until(deadline):
                    block = await anext(blocks)
                ended = any(map(upstream.ends, block.splitlines()))
                if not (ended or block.endswith(b"\n")):
                    raise upstream.broken_off()
                yield block
            if not block.endswith(b"\n\n"):  # the end of its last event may have been still to come
                yield b"\n\n"
        except Refused as error:
            yield f"\n{chat.failure(error)}{chat.DONE}"


class Passed(StreamingResponse):
    """A stream that is not held. It ends soon after the deadline even where nobody reads it, and the target's with it."""

    def __init__(self, gateway: Gateway, response: httpx2.Response, deadline: float):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(gateway.passed_on(response, deadline), response.status_code, headers, "text/event-stream")
        self.response, self.end = response, deadline + GRACE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.end - time.monotonic()):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a stream was not read by its deadline %s", scope["state"]["name"])
        finally:
            await self.response.aclose()


def _digest(files: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).digest()


# --- routes --------------------------------------------------------------------------------------------------------------------------


async def complete(gateway: Gateway, request: Request) -> Response:
    done = Done()
    try:
        answer = await _completed(gateway, request, done)
    except Refused as error:
        answer = refusal(error, request.url.path, gateway.serving.how.fail_open)
    finally:
        if done.guard != "off":
            gateway.guarded.labels(done.guard if done.flagged or done.guard == "passed" else "not_judged").inc()
    answer.headers.update(done.headers)
    return answer


async def _completed(gateway: Gateway, request: Request, done: Done) -> Response:
    if bypassed := _bypasses(gateway, request):
        done.rewrite = "bypassed"
    deadline = time.monotonic() + gateway.seconds(request)
    data: bytes | bytearray = await gateway.read(request, deadline)
    async with gateway.until(deadline):
        if bypassed:
            gateway.bypasses.inc()
            log.warning("bypass: neither rewritten nor judged %s", request.state.name)
            return await _handed_on(gateway, request, await gateway.asked(request, "/chat/completions", bytes(data)), deadline)
        body = (await gateway.thread(partial(parse, Anything, data, gateway.serving.limits))).root
        sent, said = await gateway.on_their_way(request, body, deadline, done)
        if gateway.judge:
            done.guard = "request"
            done.flagged = await gateway.flags(request, [said], deadline)
            if done.flagged:
                return stopped(body)
            done.guard = "passed"
        response = await gateway.asked(request, "/chat/completions", sent)
        if gateway.judge:
            return await _judged(gateway, request, response, body, said, deadline, done)
        return await _handed_on(gateway, request, response, deadline)


def _bypasses(gateway: Gateway, request: Request) -> bool:
    """Whether a request is to go on as it is."""
    given = request.headers.get("x-pgjax-bypass")
    if given is None:
        return False
    if gateway.bypass is None or not hmac.compare_digest(given.encode(), gateway.bypass.encode()):
        raise Refused(401, "invalid_bypass_key", "the key in X-Pgjax-Bypass is wrong, or this server takes none; leave the header out")
    return True


def _written(body: Mapping[str, Any], prompts: Mapping[int, str], shown: Mapping[str, str]) -> bytes:
    """Always from what was read: of two keys of one name, a target might read the other."""
    body = {**body, "messages": exchanged(body["messages"], prompts, shown)}
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        raise Refused(400, "invalid_json", "the body has a number that JSON has no form for") from None


async def _judged(
    gateway: Gateway, request: Request, response: httpx2.Response, body: Mapping[str, Any], said: Said, deadline: float, done: Done
) -> Response:
    """The target's answer, all of which the guard has read; an error's text is held back."""
    if not response.is_success:
        await response.aclose()
        raise _failed(response, "and what it says beside that is held back")
    done.guard, stream = "response", upstream.is_stream(response)
    texts, again = await gateway.thread(partial(upstream.parsed, await present(request, upstream.whole(response)), stream))
    try:
        done.flagged = await gateway.flags(request, [said._replace(response=text) for text in texts], deadline)
    except Refused as error:
        raise error if error.status != 400 else Refused(502, "not_judged", f"the answer is held back: {error.message}") from None
    if done.flagged:
        return stopped(body)
    done.guard = "passed"
    return Response(again, media_type="text/event-stream" if stream else "application/json", headers={"Cache-Control": "no-cache"})


async def _handed_on(gateway: Gateway, request: Request, response: httpx2.Response, deadline: float) -> Response:
    """The target's answer, and its errors; a stream is read as it is handed on."""
    if upstream.is_stream(response):
        return Passed(gateway, response, deadline)
    data = await present(request, upstream.whole(response))
    try:
        await gateway.texts.run(json.loads, data)
    except (ValueError, RecursionError):
        raise _failed(response, "and no JSON") from None
    again = {"Retry-After": response.headers["retry-after"]} if "retry-after" in response.headers else {}
    return Response(data, response.status_code, media_type="application/json", headers=again)


def _failed(response: httpx2.Response, more: str) -> Refused:
    """The target's own status, where it is one of an error."""
    status, after = response.status_code, response.headers.get("retry-after", "")
    retry = int(after) if re.fullmatch("[0-9]{1,6}", after) else None
    return Refused(status if status >= 400 else 502, "upstream_failed", f"the model's server answered {status}, {more}", retry=retry)


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
    async with gateway.until(deadline):
        return await _handed_on(gateway, request, await gateway.asked(request, "/models"), deadline)


ENDPOINTS: Endpoints = {("POST", "/v1/chat/completions"): complete, ("GET", "/v1/models"): models, **ALWAYS}
