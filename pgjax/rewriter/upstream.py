"""The target behind the gateway: an OpenAI-compatible server, what it answers, and what that says."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2

from pgjax.endpoint import LARGEST_REPLY
from pgjax.serving.endpoints import is_loopback
from pgjax.serving.requests import Refused

_LINE = re.compile("\r\n|\r|\n")
_NOT_SAID = ("role", "id", "type", "finish_reason", "logprobs")  # keys of a choice under which there is no text, or the same again


def checked_url(url: str, allow_remote: bool) -> str:
    """Without a slash at its end. ValueError for what is no URL up to /v1, and without `allow_remote` for one whose host is not this
    machine by its name alone."""
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL:
        parts = httpx2.URL("")
    whole = parts.scheme in ("http", "https") and parts.host and parts.path.rstrip("/").endswith("/v1")
    if not whole or set("@?#") & set(url):
        raise ValueError("--upstream must be http(s)://HOST/v1, without user, password and query; a key goes to --upstream-key-file")
    if not (allow_remote or is_loopback(parts.raw_host.decode())):
        raise ValueError(f"--upstream {parts.host}: requests would leave this machine; say --allow-remote")
    return url.rstrip("/")


@dataclass
class Upstream:
    """Nothing of a client's request reaches it but the body; no redirect is followed, and no proxy of the environment asked."""

    url: str  # as of `checked_url`
    key: str | None = None
    client: httpx2.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        self.client = httpx2.AsyncClient(
            headers=headers | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # the request's deadline is for the whole
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),  # servers close theirs after 5 s, some while we send
        )

    async def open(self, method: str, path: str, body: bytes | None = None) -> httpx2.Response:
        """Its answer, of which nothing has been read; whoever has it closes it. Refused where there is none."""
        try:
            response = await self.client.send(self.client.build_request(method, self.url + path, content=body), stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            raise Refused(502, "upstream_unreachable", "the model's server cannot be reached", retry=1) from None
        except httpx2.HTTPError:
            raise broken_off() from None
        if 300 <= response.status_code < 400:
            await response.aclose()
            raise Refused(502, "upstream_failed", "the model's server answers with a redirect, and none is followed")
        return response


def broken_off() -> Refused:
    return Refused(502, "upstream_broke_off", "the model's server ended its answer before it was whole")


async def pieces(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Its body as it comes. Refused where it breaks off, and beyond LARGEST_REPLY bytes."""
    size = 0
    try:
        async for piece in response.aiter_raw():
            size += len(piece)
            if size > LARGEST_REPLY:
                raise Refused(502, "upstream_failed", f"the model's answer has more than {LARGEST_REPLY} bytes")
            yield piece
    except httpx2.HTTPError:
        raise broken_off() from None


async def whole(response: httpx2.Response) -> bytes:
    """All of it, and closed."""
    try:
        return b"".join([piece async for piece in pieces(response)])
    finally:
        await response.aclose()


def is_stream(response: httpx2.Response) -> bool:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"


# --- what an answer says -----------------------------------------------------------------------------------------------------------


def said(response: httpx2.Response, data: bytes) -> list[str]:
    """The text of each choice of a completion, whole or streamed. Refused for what is none: nobody could say what it says."""
    try:
        texts: dict[int, dict[tuple, str]] = {}
        for choice in _streamed(data) if is_stream(response) else json.loads(data)["choices"]:
            of_choice = texts.setdefault(choice.get("index", 0), {})
            for place, text in _strings(choice):
                of_choice[place] = of_choice.get(place, "") + text
        return ["\n".join(text for text in of_choice.values() if text.strip()) for of_choice in texts.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(502, "upstream_failed", "the model's answer is no chat completion") from None


def ends(line: bytes) -> bool:
    """Whether a stream's line is its last."""
    return line.startswith(b"data:") and line[5:].strip() == b"[DONE]"


def _streamed(data: bytes) -> list[dict]:
    """The choices in a stream's events."""
    lines = [line for line in _LINE.split(data.decode("utf-8-sig")) if line.startswith("data:")]
    if not any(ends(line.encode()) for line in lines):
        raise broken_off()
    return [choice for line in lines if not ends(line.encode()) for choice in json.loads(line[5:]).get("choices", ())]


def _strings(value: Any, place: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """The texts in a choice, and where they stand: content, refusal, reasoning, arguments of tools, whatever."""
    match value:
        case str():
            yield place, value
        case dict() | list():
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if key not in _NOT_SAID:
                    yield from _strings(part, (*place, key))
