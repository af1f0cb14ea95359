"""`pgjax serve`: one guard behind HTTP, in OpenAI's shapes and in one of our own (docs/serving.md).

The event loop reads and answers; bodies are parsed, pictures decoded and prompts made in a few threads; the engine has its own.
"""

import asyncio
import math
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import anyio.to_thread
import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pgjax.data.images import load_image
from pgjax.data.rows import conversation
from pgjax.serving import chat, moderations
from pgjax.serving.border import GONE, Border, log, refusal
from pgjax.serving.engine import Ask, Full, Stopped, Told
from pgjax.serving.fetch import fetch_image
from pgjax.serving.guard import Case, Guard, How
from pgjax.serving.metrics import Metrics
from pgjax.serving.requests import (
    B,
    Chat,
    Judging,
    Limits,
    Moderation,
    Refused,
    Said,
    data_image,
    parse,
    to_continue,
    to_judge,
    to_moderate,
)

THREADS = 2  # that parse, decode and tokenize: what strangers' pictures take of memory is bounded by them
LONGEST_RETRY = 60  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class Serving:
    """How a guard is served."""

    name: str  # of the model, for clients
    how: How = How()  # where a request says nothing
    own: str | None = None  # policy of requests without one: text, or ids of the guard's taxonomy
    categories: tuple[str, ...] = ()
    limits: Limits = Limits()
    key: str | None = None
    image_hosts: frozenset[str] = frozenset()  # whose pictures are fetched
    drain: float = 60.0  # seconds that a stopping server gives to requests under way


@dataclass
class Service:
    guard: Guard
    serving: Serving
    ready: bool = field(default=False, init=False)  # a request has gone through the engine, and none has asked the server to stop

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.guard.engine)
        self.threads = anyio.CapacityLimiter(THREADS)
        self.ended: deque[float] = deque(maxlen=64)  # when answers came, time.monotonic()
        self.first = self.guard.ask(conversation("Hello.", None, None), self.policy(), self.serving.how)[0]

    def policy(self, own: str | None = None, categories: Sequence[str] = ()):
        """The request's policy, or the server's. ValueError for what cannot be one."""
        if own is None and not categories:
            own, categories = self.serving.own, self.serving.categories
        return self.guard.policy(tuple(categories), own)

    # --- routes --------------------------------------------------------------------------------------------------------------------

    async def judge(self, request: Request) -> Response:
        body, began = await self.body(request, Judging), time.monotonic()
        self.check_model(body.model)
        how = self.serving.how
        given = {"mode": body.mode, "samples": body.samples, "threshold": body.threshold}
        how = replace(how, **{key: value for key, value in given.items() if value is not None}, seed=body.seed, categories=body.scores)
        said, own = to_judge(body, self.serving.limits), body.own(self.serving.limits)
        [(ask, case, verdict)] = await self.verdicts(request, [said], own, body.categories, how, body.timeout)
        head = {"id": f"guard-{uuid.uuid4().hex}", "model": self.serving.name, "latency_ms": round(1000 * (time.monotonic() - began), 1)}
        return JSONResponse(head | verdict | {"usage": chat.usage(ask, case.future.result())})

    async def moderate(self, request: Request) -> Response:
        body = await self.body(request, Moderation)
        self.check_model(body.model, moderations.ALIASES)
        said, own = to_moderate(body, self.serving.limits), body.own(self.serving.limits)
        judged = await self.verdicts(request, said, own, body.categories, self.serving.how)
        results = [moderations.result(case, verdict) for _, case, verdict in judged]
        return JSONResponse({"id": f"modr-{uuid.uuid4().hex}", "model": self.serving.name, "results": results})

    async def chat(self, request: Request) -> Response:
        body = await self.body(request, Chat)
        self.check_model(body.model)
        body.check()
        messages, urls = to_continue(body.messages, self.serving.limits)
        most = self.guard.recipe.answer.max_tokens
        how = dict(
            limit=min(most, body.max_completion_tokens or body.max_tokens or most),
            samples=body.n or 1,
            temperature=1.0 if body.temperature is None else body.temperature,
            seed=(secrets.randbits(32) if body.seed is None else body.seed) % 2**32,
            deadline=self.deadline(request),
        )
        ears = chat.Ears() if body.stream else None
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.serving.name}
        async with self.until(how["deadline"]):
            images = await self.images(urls)
            ask: Ask = await self.thread(lambda: self.guard.chat(messages, images, heard=ears and ears.hear, **how), images)
            future = self.submit([ask])[0]
            if ears is None:
                [answers] = await self.answers(request, [future])
                return JSONResponse(chat.completion(self.guard, head, ask, answers))
        future.add_done_callback(lambda _: ears.hear(None))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        stream = chat.events(self.guard, head, ask, future, ears, with_usage, self.refused)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def models(self, request: Request) -> Response:
        one = {"id": self.serving.name, "object": "model", "created": 0, "owned_by": "pgjax", "not_a_guard": self.guard.recipe.not_a_guard}
        if "name" in request.path_params:
            self.check_model(request.path_params["name"])
            return JSONResponse(one)
        return JSONResponse({"object": "list", "data": [one]})

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readiness(self, request: Request) -> Response:
        return PlainTextResponse("ready\n" if self.ready else "not ready\n", 200 if self.ready else 503)

    async def measured(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # --- what they share -------------------------------------------------------------------------------------------------------------

    async def body(self, request: Request, model: type[B]) -> B:
        """The request's body, read within the limits of size and time."""
        most, data = self.serving.limits.body, bytearray()
        too_large = Refused(413, "body_too_large", f"the body has more than {most} bytes; send smaller images or fewer texts")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.serving.limits.timeout):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, "body_timeout", "the body did not arrive in time") from None
        return await self.thread(lambda: parse(model, bytes(data)))

    def check_model(self, name: str | None, also: Sequence[str] = ()) -> None:
        if name not in (None, self.serving.name, *also):
            raise Refused(404, "model_not_found", f"this server has the model {self.serving.name} and no other; see /v1/models", "model")

    def deadline(self, request: Request, timeout: float | None = None) -> float:
        """time.monotonic() by which the answer must be there: a request may ask for less time than the server gives."""
        given = request.headers.get("x-request-timeout")
        try:
            asked = math.inf if given is None else float(given)
        except ValueError:
            asked = math.nan
        if not asked > 0:
            raise Refused(400, "invalid_timeout", "X-Request-Timeout must be a positive number of seconds")
        return time.monotonic() + min(self.serving.limits.timeout, asked, math.inf if timeout is None else timeout)

    @asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[None]:
        """Errors of the engine and of the deadline as refusals."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                yield
        except (Full, Stopped, TimeoutError) as error:
            raise self.refused(error) from None

    def refused(self, error: Exception) -> Refused:
        match error:
            case Refused():
                return error
            case Full():
                return Refused(429, "queue_full", f"{error}; come again later", retry=self.retry())
            case Stopped():
                return Refused(503, "shutting_down", "the server is shutting down; ask another", retry=1)
            case TimeoutError():
                return Refused(504, "timeout", "the answer was not complete within the time allowed")
        log.error("an answer failed: %s", type(error).__name__)
        return Refused(500, "internal_error", "the server failed")

    def retry(self) -> int:
        """Seconds that the queue will take at the pace of the last answers."""
        spent = time.monotonic() - self.ended[0] if self.ended else 0.0
        return min(max(math.ceil(self.guard.engine.counts.waiting * spent / max(len(self.ended), 1)), 1), LONGEST_RETRY)

    async def thread(self, run: Callable[[], T], images: Sequence[bytes] = ()) -> T:
        """Runs what takes time aside from the event loop. Its ValueErrors are the client's; a picture that cannot be read says why."""

        def explained() -> T:
            try:
                return run()
            except (ValueError, TypeError, jinja2.TemplateError) as error:  # the last two are how chat templates fail
                for n, image in enumerate(images):
                    try:
                        load_image(image)
                    except ValueError as reason:
                        raise Refused(400, "invalid_image", f"image {n + 1}: {reason}") from None
                if not isinstance(error, ValueError):
                    raise Refused(400, "invalid_value", "the model's chat template does not take these messages") from None
                raise Refused(400, "invalid_value", str(error)) from None

        return await anyio.to_thread.run_sync(explained, limiter=self.threads)

    async def images(self, urls: Sequence[str]) -> list[bytes]:
        hosts, most = self.serving.image_hosts, self.serving.limits.body
        remote = lambda url: url[:8].lower().startswith(("http:", "https:"))  # noqa: E731
        return [await fetch_image(url, hosts, most) if remote(url) else await self.thread(lambda url=url: data_image(url)) for url in urls]

    async def verdicts(
        self, request: Request, said: Sequence[Said], own: str | None, categories: Sequence[str], how: How, timeout: float | None = None
    ) -> list[tuple[Ask, Case, dict]]:
        how = replace(how, deadline=self.deadline(request, timeout))
        async with self.until(how.deadline):
            policy = await self.thread(lambda: self.policy(own, categories))
            asks, cases = [], []
            for one in said:
                images = await self.images(one.urls)
                example = await self.thread(lambda one=one, images=images: one.example(images))
                ask, nodes = await self.thread(lambda example=example: self.guard.ask(example, policy, how), images)
                asks.append(ask)
                cases.append((example, policy, how, nodes))
            futures = self.submit(asks)
            await self.answers(request, futures)
            done = [Case(*case, future) for case, future in zip(cases, futures, strict=True)]
            found = [(ask, case, await anyio.to_thread.run_sync(self.guard.verdict, case)) for ask, case in zip(asks, done, strict=True)]
        for _, _, verdict in found:
            self.metrics.judged(request.url.path, verdict)
        return found

    def submit(self, asks: Sequence[Ask]) -> list["Future[list[Told]]"]:
        """All of them, or none."""
        futures: list[Future[list[Told]]] = []
        try:
            for ask in asks:
                futures.append(self.guard.engine.submit(ask))
        except Exception as error:
            for future in futures:
                future.cancel()
            raise Refused(400, "invalid_value", str(error)) from None if isinstance(error, ValueError) else error
        for future in futures:
            future.add_done_callback(lambda done: done.cancelled() or self.ended.append(time.monotonic()))
        return futures

    async def answers(self, request: Request, futures: Sequence["Future[list[Told]]"]) -> list[list[Told]]:
        """What the engine answers. Where the client hangs up, or time is up, the rows are free again."""
        work = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone = asyncio.ensure_future(request.receive())  # the body has been read: what comes next is the end
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            gone.cancel()
            work.cancel()
            for future in futures:
                future.cancel()

    async def warm_up(self) -> None:
        """Compiles the engine's programs, before anyone waits for them."""
        try:
            await asyncio.wrap_future(self.guard.engine.submit(self.first))
            self.ready = True
        except Exception as error:
            log.error("not ready: the first request failed: %s", error)


def make_app(service: Service) -> Starlette:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        warming = asyncio.create_task(service.warm_up())
        yield
        service.ready = False
        warming.cancel()

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error, request.url.path, service.serving.how.fail_open)

    def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, what = ("method_not_allowed", "another method") if error.status_code == 405 else ("not_found", "nothing here")
        return refuse(request, Refused(error.status_code, code, f"{what}; the routes are listed in docs/serving.md"))

    engine, post = service.guard.engine, {"methods": ["POST"]}
    border = Middleware(
        Border,
        metrics=service.metrics,
        key=service.serving.key,
        room=engine.rows + engine.queue,
        retry=service.retry,
        fail_open=service.serving.how.fail_open,
    )
    return Starlette(
        routes=[
            Route("/v1/guard", service.judge, **post),
            Route("/v1/moderations", service.moderate, **post),
            Route("/v1/chat/completions", service.chat, **post),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.models),
            Route("/healthz", service.health),
            Route("/readyz", service.readiness),
            Route("/metrics", service.measured),
        ],
        middleware=[border],
        exception_handlers={
            Refused: refuse,
            HTTPException: no_route,
            ClientDisconnect: lambda *_: Response(status_code=GONE),
        },
        lifespan=lifespan,
    )
