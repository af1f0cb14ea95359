"""What the routes of `pgjax serve` share, whatever the model: a request's body and deadline, threads for what takes time, the way into the
engine and out."""

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jinja2
from starlette.requests import ClientDisconnect, Request

from pgjax.data.images import load_image
from pgjax.serving.border import log
from pgjax.serving.engine import Ask, Full, Stopped, Told
from pgjax.serving.fetch import fetch_image
from pgjax.serving.guard import How
from pgjax.serving.metrics import Metrics
from pgjax.serving.model import Model
from pgjax.serving.requests import B, Limits, Refused, check_size, data_image, parse

THREADS = 2  # that parse and tokenize, and as many that decode pictures: what strangers' pictures take of memory is bounded by them
LONGEST_RETRY = 60  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class Serving:
    """How a model is served; `how`, `own` and `categories` are a guard's."""

    name: str  # of the model, for clients
    how: How = How()  # where a request says nothing
    own: str | None = None  # policy of requests that bring none; None is the guard's
    categories: tuple[str, ...] = ()  # that it lists where a request names none; () is all
    limits: Limits = Limits()
    key: str | None = None
    image_hosts: frozenset[str] = frozenset()  # whose pictures are fetched
    drain: float = 60.0  # seconds that a stopping server gives to requests under way


class Threads:
    """So many jobs at a time. Who waits for a place waits in the event loop, and a cancelled wait leaves nothing behind; a job that runs
    when nobody waits for it any more keeps its place until it ends."""

    def __init__(self, number: int):
        self.pool, self.places = ThreadPoolExecutor(number), asyncio.Semaphore(number)

    async def run(self, job: Callable[..., T], *args: Any) -> T:
        await self.places.acquire()
        loop, future = asyncio.get_running_loop(), self.pool.submit(job, *args)

        def leave(_: Future) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.places.release)

        future.add_done_callback(leave)
        return await asyncio.wrap_future(future)


class Common(NamedTuple):
    """What the models of one server share."""

    metrics: Metrics
    texts: Threads
    pictures: Threads


@dataclass
class Desk(ABC):
    """One model of a server; alone, unless it is given what it has in `common` with another."""

    model: Model
    serving: Serving
    common: Common | None = None
    ready: bool = field(default=False, init=False)  # a request has gone through the engine, and none has asked the server to stop

    def __post_init__(self) -> None:
        self.metrics, self.texts, self.pictures = self.common or Common(Metrics(), Threads(THREADS), Threads(THREADS))
        self.ended: deque[float] = deque(maxlen=64)  # time.monotonic(): when work came to an idle engine, and when answers came since
        self.tried: Future | None = None  # the server's own request
        self.first = self.hello()

    @property
    def room(self) -> int:
        """Requests that may be under way."""
        return self.model.engine.rows + self.model.engine.queue

    @abstractmethod
    def hello(self) -> Ask:
        """The server's own request."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the server does."""
        warming = asyncio.create_task(self.warm_up())
        yield
        self.ready = False
        warming.cancel()

    async def warm_up(self) -> None:
        """Compiles the engine's programs, before anyone waits for them."""
        try:
            self.tried = self.model.engine.submit(self.first)
            await asyncio.wrap_future(self.tried)
            self.ready = True
        except Exception as error:
            log.error("not ready: the first request failed: %s", error)

    def healthy(self) -> bool:
        """Whether requests may come: not while the engine's last round failed. A request of the server's own tries it again then."""
        failing = self.model.engine.failing
        if self.ready and failing and self.tried and self.tried.done():
            with suppress(Full, Stopped):
                self.tried = self.model.engine.submit(self.first)
        return self.ready and not failing

    # --- in --------------------------------------------------------------------------------------------------------------------------

    async def body(self, request: Request, model: type[B]) -> tuple[B, float]:
        """The request's body, read within the limits of size and time, and time.monotonic() by which the answer must be there."""
        deadline = time.monotonic() + self.seconds(request)
        data = await self.read(request, deadline)
        async with self.until(deadline):
            return await self.thread(partial(parse, model, data, self.serving.limits)), deadline

    async def read(self, request: Request, deadline: float) -> bytearray:
        """The same as it came."""
        most, data = self.serving.limits.body, bytearray()
        too_large = Refused(413, "body_too_large", f"the body has more than {most} bytes; send smaller images or fewer texts")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, "body_timeout", "the body did not arrive in time; send it faster, or less") from None
        return data

    def check_model(self, name: str | None, also: Sequence[str] = ()) -> None:
        if name not in (None, self.serving.name, *also):
            raise Refused(404, "model_not_found", f"this server has the model {self.serving.name} and no other; see /v1/models", "model")

    def seconds(self, request: Request) -> float:
        """That the answer may take: a request may ask for less time than the server gives."""
        given = request.headers.get("x-request-timeout")
        try:
            asked = math.inf if given is None else float(given)
        except ValueError:
            asked = math.nan
        if not asked > 0:
            raise Refused(400, "invalid_timeout", "X-Request-Timeout must be a positive number of seconds")
        return min(self.serving.limits.timeout, asked)

    async def thread(self, run: Callable[[], T], images: Sequence[bytes] = ()) -> T:
        """Runs what takes time aside from the event loop. Its ValueErrors are the client's; a picture that cannot be read says why."""
        return await (self.pictures if images else self.texts).run(_explained, run, images)

    async def images(self, urls: Sequence[str]) -> list[bytes]:
        found, limits = [], self.serving.limits
        for url in urls:
            if url[:8].lower().startswith(("http:", "https:")):
                data = await fetch_image(url, self.serving.image_hosts, limits.body)
            else:
                data = await self.thread(partial(data_image, url))
            found.append(await self.thread(partial(check_size, data, limits.pixels)))
        return found

    # --- through the engine ------------------------------------------------------------------------------------------------------------

    def submit(self, asks: Sequence[Ask]) -> list["Future[list[Told]]"]:
        """All of them, or none."""
        futures: list[Future[list[Told]]] = []
        if not (self.model.engine.counts.busy or self.model.engine.counts.waiting):
            self.ended.clear()
            self.ended.append(time.monotonic())
        try:
            for ask in asks:
                futures.append(self.model.engine.submit(ask))
        except (ValueError, Full, Stopped) as error:
            for future in futures:
                future.cancel()
            raise (Refused(400, "invalid_value", str(error)) if isinstance(error, ValueError) else error) from None
        for future in futures:
            future.add_done_callback(self._note)
        return futures

    def _note(self, future: Future) -> None:
        if not future.cancelled():
            self.ended.append(time.monotonic())

    async def answers(self, request: Request, futures: Sequence["Future[list[Told]]"]) -> list[list[Told]]:
        """What the engine answers. Where the client hangs up, or time is up, the rows are free again."""
        try:
            await present(request, asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True))
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

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
            case Full():
                return Refused(429, "queue_full", f"{error}; come again later", retry=self.retry())
            case Stopped():
                return Refused(503, "shutting_down", "the server is shutting down; ask another", retry=1)
            case TimeoutError():
                return Refused(504, "timeout", "the answer was not complete within the time allowed; allow more, or ask for less")
        log.error("an answer failed: %s", type(error).__name__)
        return Refused(500, "internal_error", "the server failed")

    def retry(self) -> int:
        """Seconds that the queue will take at the pace of the last answers, without the quiet before them."""
        pace = (self.ended[-1] - self.ended[0]) / (len(self.ended) - 1) if len(self.ended) > 1 else 0.0
        return min(max(math.ceil(self.model.engine.counts.waiting * pace), 1), LONGEST_RETRY)


async def present(request: Request, work: Awaitable[T]) -> T:
    """What comes of it; where the client hangs up before, nothing: it is cancelled, and ClientDisconnect raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())  # the body has been read: what comes next is the end
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def _explained(run: Callable[[], T], images: Sequence[bytes]) -> T:
    try:
        return run()
    except (ValueError, TypeError, jinja2.TemplateError) as error:  # the last two are how chat templates fail
        for n, image in enumerate(images if "image" in str(error) else (), 1):
            try:
                load_image(image)
            except ValueError as reason:
                raise Refused(400, "invalid_image", f"image {n}: {reason}") from None
        if not isinstance(error, ValueError):
            raise Refused(400, "invalid_value", "the model's chat template does not take these messages") from None
        raise Refused(400, "invalid_value", str(error)) from None
