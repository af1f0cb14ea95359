"""`pgjax serve`: one guard behind HTTP, in OpenAI's shapes and in one of our own (docs/serving.md).

The event loop reads and answers; bodies are parsed, pictures decoded and prompts made in a few threads; the engine has its own.
"""

import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pgjax.serving import chat, moderations
from pgjax.serving.border import GONE, Border, refusal
from pgjax.serving.desk import Desk
from pgjax.serving.guard import How
from pgjax.serving.requests import Chat, Judging, Moderation, Refused, to_continue, to_judge, to_moderate
from pgjax.serving.service import Service


async def judge(service: Service, request: Request) -> Response:
    began, usual = time.monotonic(), service.serving.how
    body, deadline = await service.body(request, Judging)
    service.check_model(body.model)
    threshold = usual.threshold if body.threshold is None else body.threshold
    how = How(body.mode or usual.mode, body.samples or usual.samples, threshold, usual.fail_open, body.scores, body.seed)
    said = to_judge(body, service.serving.limits)
    deadline = deadline if body.timeout is None else min(deadline, began + body.timeout)
    [judged] = await service.verdicts(request, [said], body, how, deadline)
    head = {"id": f"guard-{uuid.uuid4().hex}", "model": service.serving.name, "latency_ms": round(1000 * (time.monotonic() - began), 1)}
    return JSONResponse(head | judged.verdict | {"usage": chat.usage(judged.ask, judged.case.future.result())})


async def moderate(service: Service, request: Request) -> Response:
    body, deadline = await service.body(request, Moderation)
    service.check_model(body.model, moderations.ALIASES)
    judged = await service.verdicts(request, to_moderate(body, service.serving.limits), body, service.serving.how, deadline)
    results = [moderations.result(one.case, one.verdict) for one in judged]
    return JSONResponse({"id": f"modr-{uuid.uuid4().hex}", "model": service.serving.name, "results": results})


async def continue_chat(service: Service, request: Request) -> Response:
    (body, deadline), guard = await service.body(request, Chat), service.model
    service.check_model(body.model)
    body.check()
    messages, urls = to_continue(body.messages, service.serving.limits)
    most, ears = guard.recipe.answer.max_tokens, chat.Ears() if body.stream else None
    how: dict[str, Any] = {
        "limit": min(most, body.max_completion_tokens or body.max_tokens or most),
        "samples": body.n or 1,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "seed": (secrets.randbits(32) if body.seed is None else body.seed) % 2**32,
        "deadline": deadline,
        "heard": ears and ears.hear,
    }
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.serving.name}
    async with service.until(deadline):
        images = await service.images(urls)
        ask = await service.thread(partial(guard.chat, messages, images, **how), images)
        [future] = service.submit([ask])
        if ears is None:
            [answers] = await service.answers(request, [future])
            return JSONResponse(chat.completion(guard, head, ask, answers))
    future.add_done_callback(lambda _: ears.hear(None))
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    stream = chat.events(guard, head, ask, future, ears, with_usage, service.refused)
    left = BackgroundTask(future.cancel)  # whoever hung up before the first event
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}, background=left)


async def models(service: Service, request: Request) -> Response:
    name = service.serving.name
    one = {"id": name, "object": "model", "created": 0, "owned_by": "pgjax", "not_a_guard": service.model.recipe.not_a_guard}
    if "name" in request.path_params:
        service.check_model(request.path_params["name"])
        return JSONResponse(one)
    return JSONResponse({"object": "list", "data": [one]})


async def health(service: Desk, request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def readiness(service: Desk, request: Request) -> Response:
    healthy = service.healthy()
    return PlainTextResponse("ready\n" if healthy else "not ready\n", 200 if healthy else 503)


async def measured(service: Desk, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


Endpoints = dict[tuple[str, str], Callable[[Any, Request], Awaitable[Response]]]  # by method and path
ALWAYS: Endpoints = {("GET", "/healthz"): health, ("GET", "/readyz"): readiness, ("GET", "/metrics"): measured}
ENDPOINTS: Endpoints = {
    ("POST", "/v1/guard"): judge,
    ("POST", "/v1/moderations"): moderate,
    ("POST", "/v1/chat/completions"): continue_chat,
    ("GET", "/v1/models"): models,
    ("GET", "/v1/models/{name:path}"): models,
    **ALWAYS,
}


def make_app(service: Desk, endpoints: Endpoints = ENDPOINTS) -> Starlette:
    serving = service.serving
    fail_open = serving.how.fail_open
    service.metrics.watch(service.model.engine)
    border = Middleware(
        Border,
        metrics=service.metrics,
        key=serving.key,
        room=service.room,
        bodies=serving.limits.bodies,
        retry=service.retry,
        fail_open=fail_open,
    )

    def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # of the router
            what = "the path takes another method" if error.status_code == 405 else "there is nothing at this path"
            code = "method_not_allowed" if error.status_code == 405 else "not_found"
            error = Refused(error.status_code, code, f"{what}; routes: {', '.join(f'{method} {path}' for method, path in endpoints)}")
        assert isinstance(error, Refused)
        return refusal(error, request.url.path, fail_open)

    app = Starlette(
        routes=[Route(path, partial(run, service), methods=[method]) for (method, path), run in endpoints.items()],
        middleware=[border],
        exception_handlers={Refused: refuse, HTTPException: refuse, ClientDisconnect: lambda *_: Response(status_code=GONE)},
        lifespan=lambda _: service.running(),
    )
    app.router.redirect_slashes = False  # a redirect has no body: a client of a judging route would not learn what no verdict means
    return app
