"""The target behind the gateway: an OpenAI-compatible server, what it answers, and what that says."""

import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from pgjax.endpoint import LARGEST_REPLY
from pgjax.rewriter.turns import strings
from pgjax.serving import chat
from pgjax.serving.endpoints import parse
from pgjax.serving.requests import Refused

LONGEST_LINE = 1 << 20  # bytes, of a stream
_URL = re.compile(r"https?://[^/@?#]+/(?:[^@?#]+/)?v1/*")
_FORM = ("id", "object", "model", "created", "system_fingerprint", "service_tier", "type", "role", "finish_reason", "index")
FORM_LENGTH = 400  # characters of all different values of those together: what has more says something


def checked_url(url: str, allow_remote: bool) -> str:
    """Without a slash at its end. ValueError for what is no URL up to /v1, and without `allow_remote` for one whose host is not this
    machine by its name alone."""
    try:
        address = parse(f"target@{url}") if _URL.fullmatch(url) and "/." not in url else None
    except ValueError:
        address = None
    if address is None:
        raise ValueError("--upstream must be http(s)://HOST/v1, without user, password and query; a key goes to --upstream-key-file")
    if not (allow_remote or address.here):
        raise ValueError(f"--upstream {address.url}: requests would leave this machine; say --allow-remote")
    return address.url


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


async def blocks(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The same, each time up to the end of a line; of the last line the end may be missing. Refused as `pieces`, and for a line of more
    than LONGEST_LINE bytes."""
    held: list[bytes] = []
    size = 0
    async for piece in pieces(response):
        whole, end, rest = piece.rpartition(b"\n")
        if end:
            yield b"".join((*held, whole, end))
            held, size = [], 0
        held.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            raise Refused(502, "upstream_failed", f"the model's answer has a line of more than {LONGEST_LINE} bytes")
    yield b"".join(held)


async def whole(response: httpx2.Response) -> bytes:
    """All of it, and closed."""
    try:
        return b"".join([piece async for piece in pieces(response)])
    finally:
        await response.aclose()


def is_stream(response: httpx2.Response) -> bool:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"


def ends(line: bytes) -> bool:
    """Whether a stream's line is its last."""
    return line.startswith(b"data:") and line[5:].strip() == b"[DONE]"


# --- what an answer says -----------------------------------------------------------------------------------------------------------


def parsed(data: bytes, stream: bool) -> tuple[list[str], str]:
    """What a completion says, of each choice, and of what else there is to read; and the completion written anew from what was read, so
    that no more is handed back: without logprobs, whose tokens and bytes nobody judges. Refused for what is none."""
    try:
        if stream:
            events = _events(data)
        else:
            events = [json.loads(data)]
            events[0]["choices"]  # noqa: B018
        for event in events:
            for choice in event.get("choices") or ():
                choice |= {"logprobs": None} if "logprobs" in choice else {}
        return _said(events), "".join(map(chat.event, events)) + chat.DONE if stream else json.dumps(events[0], allow_nan=False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(502, "upstream_failed", "the model's answer is no chat completion") from None


def _events(data: bytes) -> list[dict]:
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").splitlines() if line.startswith(b"data:")]
    if not any(map(ends, lines)):
        raise broken_off()
    return [json.loads(line[5:]) for line in lines if not ends(line)]


def _said(events: Sequence[dict]) -> list[str]:
    texts: dict[Any, dict[tuple, str]] = {}
    form: set[str] = set()
    for event in events:
        beside = {key: value for key, value in event.items() if key != "choices"}
        for number, part in [(None, beside), *((choice.get("index", 0), choice) for choice in event.get("choices") or ())]:
            for place, text in strings(part):
                if place[-1] in _FORM and (len(place) == 1 or place[:-1] in (("message",), ("delta",))):
                    form.add(text)
                else:
                    of = texts.setdefault(number, {})
                    of[place] = text if place[-1] is None else of.get(place, "") + text
    if sum(map(len, form)) > FORM_LENGTH:
        texts[""] = {(): "\n".join(sorted(form))}
    said = ("\n".join(text for text in of.values() if text.strip()) for of in texts.values())
    return [text for text in said if text]
