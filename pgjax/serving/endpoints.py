"""An endpoint from one string: a model behind a URL, or a folder with a model that is opened in this process."""

import asyncio
import ipaddress
import math
import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx2
import jax
import jinja2
from pydantic import ValidationError

from pgjax.endpoint import DEFAULTS, Endpoint, Failed, Limits, Reply, over_http
from pgjax.serving import requests
from pgjax.serving.engine import Ask
from pgjax.serving.model import Model
from pgjax.serving.requests import Message, Refused, data_image, to_continue
from pgjax.train.saved import fingerprint

_SPEC = re.compile(r"(?P<model>.+)@(?P<url>https?://[^#]+)(?:#(?P<variable>.+))?", re.DOTALL)
_FORM = "give MODEL@URL or MODEL@URL#VARIABLE, where URL is http(s)://HOST/v1 and VARIABLE names the environment variable with the key"
_NO_NAME = "what follows # is not the name of an environment variable that holds the key"
_ANY = requests.Limits(images=1000, text=1 << 30)  # the model's own limits follow


class Address(NamedTuple):
    model: str
    url: str  # without a slash at its end
    key: str
    here: bool


@asynccontextmanager
async def open_endpoint(
    spec: str, limits: Limits = DEFAULTS, cache: Path | None = None, allow_remote: bool = False
) -> AsyncIterator[Endpoint]:
    """`spec`: MODEL@URL, MODEL@URL#VARIABLE (the environment variable with the key), or a run folder or Hugging Face checkpoint directory.

    ValueError for a spec that cannot be read, a variable that is not set, a folder without a model, and, without `allow_remote`, for a
    URL whose host is not this machine by its name alone (localhost, 127.0.0.0/8, ::1).
    """
    if "://" in spec:
        address = parse(spec)
        if not (address.here or allow_remote):
            raise ValueError(f"{address.model}@{address.url}: content would leave this machine; give --allow-remote")
        opened = over_http(*address[:3], limits, cache, address.here)
    else:
        opened = in_process(Path(spec), limits, cache)
    async with opened as endpoint:
        yield endpoint


@asynccontextmanager
async def open_endpoints(specs: Iterable[str], limits: Limits, cache: Path, allow_remote: bool) -> AsyncIterator[list[Endpoint]]:
    """All of them, or none. ValueError as above."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_endpoint(spec, limits, cache, allow_remote)) for spec in specs]


def parse(spec: str) -> Address:
    """A model behind a URL. ValueError in one line, without what may be a secret."""
    found = _SPEC.fullmatch(spec)
    try:
        url = httpx2.URL(found["url"]) if found else None  # read by those who will connect to it
    except httpx2.InvalidURL:
        url = None
    if not (found and url and url.host and (url.port or 0) < 2**16):
        raise ValueError(f"an endpoint's URL cannot be read: {_FORM}")
    model, variable = found["model"], found["variable"]
    if url.userinfo or "?" in found["url"]:
        raise ValueError(f"endpoint {model}@{url.host}: its URL may have no user, password or query; {_FORM}")
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not (key and key.isascii() and key.isprintable()):
        named = re.fullmatch("[A-Z_][A-Z0-9_]*", variable)  # else it may be a key
        wrong = f"the environment variable {variable} has no key; set it, or leave out #{variable}" if named else _NO_NAME
        raise ValueError(f"endpoint {model}@{url.host}: {wrong}")
    return Address(model, found["url"].rstrip("/"), key, is_loopback(url.raw_host.decode()))


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name alone; nothing is looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@asynccontextmanager
async def in_process(folder: Path, limits: Limits, cache: Path | None) -> AsyncIterator[Endpoint]:
    """A pgjax run folder or a checkpoint directory. Its calls have no limit of time and one try: the first one compiles for minutes where
    the model is large, and a second try would end as the first."""
    if not folder.is_dir():
        named = str(folder).partition("#")[0]  # what follows may be a key
        raise ValueError(f"{named}: no such folder; give a run folder or a checkpoint directory, or for a server {_FORM}")
    identity, rows = fingerprint(folder), math.ceil(limits.concurrency / jax.device_count())
    with Model.load(folder, rows=rows, queue=2 * limits.concurrency) as model:  # those that were cancelled stay in the queue for a while

        async def send(payload: dict) -> Reply:
            ask = await asyncio.to_thread(to_ask, model, payload)
            try:
                [told] = await asyncio.wrap_future(model.engine.submit(ask))
            except ValueError as error:
                raise Failed("refused", str(error)) from None
            except Exception as error:  # whatever a program may raise
                raise Failed("server", f"the model failed: {type(error).__name__}") from None
            return Reply(model.text(told.tokens), int(ask.prompt.length_P[0]), len(told.tokens), 0.0)

        yield Endpoint(str(folder), True, send, replace(limits, timeout=math.inf, tries=1), cache, identity)


def to_ask(model: Model, payload: dict) -> Ask:
    """What the model is asked by a payload of `Endpoint.send`. Raises Failed."""
    try:
        messages, urls = to_continue([Message.model_validate(message) for message in payload["messages"]], _ANY)
        limit = min(payload["max_tokens"], model.recipe.answer.max_tokens)
        how = {"temperature": payload["temperature"], "seed": payload.get("seed", 0)}
        return model.chat(messages, [data_image(url) for url in urls], limit=limit, **how)
    except Refused as error:
        raise Failed("refused", error.message) from None
    except (ValidationError, TypeError, jinja2.TemplateError):  # which may have texts in them; the last two are how chat templates fail
        raise Failed("refused", "the model's chat template does not take these messages") from None
    except ValueError as error:
        raise Failed("refused", str(error)) from None
