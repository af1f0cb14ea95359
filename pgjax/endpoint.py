"""The one client for models that answer chats, in OpenAI's form: many calls at a time, none too fast, tried again where that may help,
and each answer kept on disk, so that a run that was killed goes on where it was.

`Endpoint` knows nothing of how a call is sent: `over_http` sends it to an OpenAI-compatible server, serving/endpoints.py also to a model
in this process. Texts and keys are never in errors and counts.
"""

import asyncio
import base64
import hashlib
import io
import json
import random
import shlex
import sys
from asyncio import sleep
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import monotonic, time
from typing import Annotated, Literal, NamedTuple
from weakref import WeakValueDictionary

import httpx2
from PIL import Image
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from pgjax.data.images import FORMATS
from pgjax.files import read_json, replace_file

LONGEST_WAIT = 300.0  # seconds between two tries, whatever a server asks for
LARGEST_REPLY = 16 << 20  # bytes
Kind = Literal["timeout", "rate", "server", "connection", "malformed", "refused", "denied"]


class Failed(Exception):
    """A call, or after all tries an ask, that has no answer. What is "refused" is not tried again; what is "denied" neither, nor would
    any other ask be answered. `wait`: seconds for which the server wants to hear nothing."""

    def __init__(self, kind: Kind, message: str, wait: float = 0.0):
        super().__init__(message)
        self.kind, self.wait = kind, wait


@dataclass(frozen=True)
class Limits:
    concurrency: int = 8  # calls at a time
    per_minute: int = 0  # calls; 0: no limit
    timeout: float = 120.0  # seconds of a call
    tries: int = 5
    backoff: float = 1.0  # seconds before the second try, twice as many before each further one, less up to half by chance

    def __post_init__(self) -> None:
        if min(self.concurrency, self.tries) < 1 or min(self.per_minute, self.backoff) < 0 or not self.timeout > 0:
            raise ValueError(f"an endpoint's limits must be positive (per_minute and backoff may be 0): {self}")


DEFAULTS = Limits()


class Reply(NamedTuple):
    text: str
    prompt_tokens: int | None
    tokens: int | None
    seconds: float  # of the call that gave it
    cached: bool = False


def command_line() -> str:
    """The command that runs; of an endpoint without what stands behind #, which may be a key."""
    return shlex.join(word.partition("#")[0] if "://" in word else word for word in sys.argv)


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str, images: Sequence[bytes] = ()) -> dict:
    """A user turn, its pictures before its text. ValueError for a file that is no picture."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}


def data_url(image: bytes) -> str:
    """The picture file in a data URL. ValueError for a file that is none."""
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            mime = Image.MIME["JPEG" if opened.format == "MPO" else opened.format or ""]  # a JPEG with more pictures behind the first
    except Exception as error:  # Pillow has many ways to say so
        raise ValueError(f"not an image that can be sent; give one of {', '.join(FORMATS)}") from error
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


@dataclass
class Endpoint:
    """One model that answers chats. `send` makes one call and raises Failed; its payload has OpenAI's keys messages, max_tokens,
    temperature and, where something is drawn, seed.

    With a folder `cache`, asks of equal content get one answer, at once or later and in whatever process: it is kept under a name made
    from `identity` and all that is asked. `counts`: calls, cached, retries:KIND, failed:KIND.
    """

    name: str  # for reports
    here: bool  # on this machine
    send: Callable[[dict], Awaitable[Reply]]
    limits: Limits = DEFAULTS
    cache: Path | None = None
    identity: str = ""  # of the model; the name where there is no better
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._next = 0.0  # time.monotonic() before which nothing is sent

    async def ask(
        self, messages: list[dict], *, max_tokens: int = 1024, temperature: float = 0.0, seed: int = 0, keep: bool = True
    ) -> Reply:
        """The model's next turn; without `keep` the cache is neither read nor written. Raises Failed after `limits.tries` tries, or at once
        where another would change nothing."""
        payload = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature}
        if temperature:  # not all servers know the key
            payload["seed"] = seed
        content = json.dumps([self.identity or self.name, payload, seed], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        if not keep:
            return await self._tried(payload, random.Random(digest))
        lock = self._asking.setdefault(digest, asyncio.Lock())
        async with lock:
            if reply := self._kept(digest):
                self.counts["cached"] += 1
                return reply
            reply = await self._tried(payload, random.Random(digest))
            self._keep(digest, reply)
            return reply

    async def _tried(self, payload: dict, chance: random.Random) -> Reply:
        tries = 0
        while True:
            tries += 1
            try:
                return await self._call(payload)
            except Failed as error:
                if error.kind in ("refused", "denied") or tries == self.limits.tries:
                    self.counts[f"failed:{error.kind}"] += 1
                    raise Failed(error.kind, f"{self.name}: {error} ({error.kind}), tries: {tries}") from None
                self.counts[f"retries:{error.kind}"] += 1
                if not error.wait:
                    await sleep(min(self.limits.backoff * 2 ** (tries - 1), LONGEST_WAIT) * chance.uniform(0.5, 1.0))

    async def _call(self, payload: dict) -> Reply:
        async with self._slots:
            await self._turn()
            self.counts["calls"] += 1
            start = monotonic()
            try:
                async with asyncio.timeout(self.limits.timeout):
                    reply = await self.send(payload)
            except TimeoutError:
                raise Failed("timeout", f"no answer in {self.limits.timeout:g} s") from None
            except Failed as error:
                self._next = max(self._next, monotonic() + error.wait)  # all who ask here wait
                raise
            return reply._replace(seconds=monotonic() - start)

    async def _turn(self) -> None:
        """Waits until a call may start. Calls are evenly spaced, so that no 60 seconds have more than per_minute of them."""
        while (wait := self._next - monotonic()) > 0:
            await sleep(wait)
        if self.limits.per_minute:
            self._next = monotonic() + 60 / self.limits.per_minute

    # --- the cache -----------------------------------------------------------------------------------------------------------------

    def _kept(self, digest: str) -> Reply | None:
        try:
            return _REPLY.validate_python(read_json(self._file(digest))) if self.cache else None
        except ValueError:  # absent, or broken
            return None

    def _keep(self, digest: str, reply: Reply) -> None:
        if self.cache:
            file = self._file(digest)
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(reply._asdict() | {"cached": True}))

    def _file(self, digest: str) -> Path:
        return Path(self.cache or "", digest[:2], f"{digest}.json")


_REPLY = TypeAdapter(Reply)

# --- over HTTP -------------------------------------------------------------------------------------------------------------------------


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


@asynccontextmanager
async def over_http(
    model: str, url: str, key: str = "", limits: Limits = DEFAULTS, cache: Path | None = None, here: bool = False
) -> AsyncIterator[Endpoint]:
    """A model of an OpenAI-compatible server; `url` up to /v1. No redirect is followed, and a server `here` is asked without a proxy:
    what is sent reaches nobody else."""
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    async with httpx2.AsyncClient(
        headers=headers,
        trust_env=not here,
        follow_redirects=False,
        timeout=None,  # Endpoint's is for the whole call
        limits=httpx2.Limits(max_connections=limits.concurrency),
    ) as client:

        async def send(payload: dict) -> Reply:
            body = json.dumps({"model": model} | payload)
            try:
                async with client.stream("POST", f"{url}/chat/completions", content=body) as response:
                    if response.status_code != 200:
                        raise _failure(response)
                    return _reply(await _body(response))
            except httpx2.HTTPError as error:
                raise Failed("connection", type(error).__name__) from None

        yield Endpoint(f"{model}@{url}", here, send, limits, cache)


async def _body(response: httpx2.Response) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > LARGEST_REPLY:
            raise Failed("malformed", f"an answer of more than {LARGEST_REPLY} bytes")
    return bytes(data)


def _reply(data: bytes) -> Reply:
    try:
        completion = _Completion.model_validate_json(data)
    except ValidationError:
        raise Failed("malformed", "the answer is no chat completion") from None
    choice, usage = completion.choices[0], completion.usage or _Usage()
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        raise Failed("refused", "the server filtered the answer")
    if choice.message.content is None:
        raise Failed("malformed", "the answer has no text")
    return Reply(choice.message.content, usage.prompt_tokens, usage.completion_tokens, 0.0)


def _failure(response: httpx2.Response) -> Failed:
    status = response.status_code
    kinds: dict[int, Kind] = {408: "timeout", 409: "server", 425: "server", 429: "rate"} | dict.fromkeys((400, 413, 422), "refused")
    kind = kinds.get(status, "server" if status >= 500 else "denied")
    advice = "; check the model's name, the key, and that the URL ends in /v1" if kind == "denied" else ""
    return Failed(kind, f"answered {status}{advice}", _seconds(response.headers.get("retry-after", "")))


def _seconds(retry_after: str) -> float:
    """Seconds from now, of a header that has seconds or a date; 0 where it has neither."""
    try:
        wait = float(retry_after) if retry_after[:1].isdigit() else parsedate_to_datetime(retry_after).timestamp() - time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), LONGEST_WAIT)
