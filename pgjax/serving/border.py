"""What every request passes: a name for it, the key, room for it, errors in OpenAI's shape, a line in the log, a count. No text of a
client's is ever logged: the lines have method, path, status, milliseconds and the request's name."""

import hmac
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgjax.serving.metrics import Metrics
from pgjax.serving.requests import Refused
from pgjax.serving.verdict import printable

ROUTES = ("/v1/chat/completions", "/v1/moderations", "/v1/guard", "/v1/models", "/healthz", "/readyz", "/metrics")
OPEN = ("/healthz", "/readyz")  # without a key; /metrics needs it: what flows through a guard is nobody else's business
JUDGING = ("/v1/moderations", "/v1/guard")
GONE = 499  # the client hung up: nobody reads the answer
_ID = re.compile(r"[!-~]{1,128}")
log = logging.getLogger("pgjax.serving")


def refusal(error: Refused, path: str, fail_open: bool) -> JSONResponse:
    """An error in OpenAI's shape. On the routes that judge it says beside it what a client must make of having no verdict."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, "server_error" if error.status >= 500 else None)
    shape = {"message": error.message, "type": kind or "invalid_request_error", "param": error.param, "code": error.code}
    fail = {"proguard": {"flagged": not fail_open, "fail": "open" if fail_open else "closed"}} if path.rstrip("/") in JUDGING else {}
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    if error.status in (401, 408, 413, 429):
        headers["Connection"] = "close"  # the body, or the rest of it, is not read
    return JSONResponse({"error": shape} | fail, error.status, headers)


@dataclass
class Border:
    """ASGI middleware. At most `room` POSTs are under way at a time, bodies that are still coming in included, and at most `bodies` bytes
    of theirs."""

    app: ASGIApp
    metrics: Metrics
    key: str | None
    room: int
    bodies: int
    retry: Callable[[], int]  # seconds after which there may be room again
    fail_open: bool
    running: int = field(default=0, init=False)
    held: int = field(default=0, init=False)  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, path, status, came, done = time.monotonic(), scope["path"], GONE, 0, False
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["name"] = name

        def account() -> None:
            """Once, before the end of the answer is sent: whoever has it finds the place free and the request counted."""
            nonlocal done
            if not done:
                done = True
                self.running, self.held = self.running - post, self.held - came
                seconds, route = time.monotonic() - began, path if path in ROUTES else "other"
                self.metrics.requests.labels(route, status).inc()
                self.metrics.seconds.labels(route).observe(seconds)
                log.info("%s %s %d %.0f ms %s", scope["method"], printable(path, 100), status, 1000 * seconds, name)

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            elif not message.get("more_body"):
                account()
            await send(message)

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            size = len(message.get("body", b""))
            if self.held + size > self.bodies:
                raise Refused(429, "queue_full", f"{self.held} bytes of requests are under way; come again later", retry=self.retry())
            if not done:
                self.held, came = self.held + size, came + size
            return message

        post = scope["method"] == "POST"
        self.running += post
        try:
            if path not in OPEN:
                self._check_key(headers.get(b"authorization", b""))
            if post and self.running > self.room:
                raise Refused(429, "queue_full", f"{self.room} requests are under way already; come again later", retry=self.retry())
            await self.app(scope, counted, named)
        except Exception as error:
            if not isinstance(error, Refused):  # of what failed, the kind and the place; its message might repeat a text
                log.error("%s failed: %s\n%s", name, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
                error = Refused(500, "internal_error", f"the server failed; its log has more under {name}")
            if status == GONE:  # nothing was sent yet
                await refusal(error, path, self.fail_open)(scope, receive, named)
        finally:
            account()

    def _check_key(self, given: bytes) -> None:
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refused(401, "invalid_api_key", "the API key is missing or wrong; send the header Authorization: Bearer KEY")
