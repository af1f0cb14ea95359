"""The models of the toy world over HTTP, in OpenAI's form, with faults on demand: `python -m pgjax.rewriter.toy_server --port 8100`."""

import argparse
import asyncio
import hashlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pgjax.rewriter.toy import MODELS

Fault = Literal["rate", "server", "malformed", "timeout", "garbled"]  # 429, 500, half a body, no answer, half an answer in a whole body
Faults = Callable[[dict, int], Fault | None]  # of a request's body, and how many equal ones came before it
HANG = 600.0  # seconds of a "timeout"; a client gives up long before
CHUNK = 12  # characters of a streamed piece


class ToyServer(NamedTuple):
    url: str  # ends in /v1
    calls: Counter[str]  # requests by model, faults included


class _Toy:
    def __init__(self, faults: Faults | None):
        self.faults, self.calls, self.seen = faults, Counter[str](), Counter[str]()

    async def chat(self, request: Request) -> Response:
        data = await request.body()
        try:
            body = json.loads(data)
            if body["model"] not in MODELS:
                return _refusal(404, f"no such model; there are {', '.join(MODELS)}")
            model = MODELS[body["model"]]
            self.calls[body["model"]] += 1
            text = model(body["messages"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return _refusal(400, f"not a chat that this model reads ({type(error).__name__})")
        digest = hashlib.sha256(data).hexdigest()
        fault, self.seen[digest] = self.faults and self.faults(body, self.seen[digest]), self.seen[digest] + 1
        match fault:
            case "rate":
                return _refusal(429, "too many requests", {"Retry-After": "0"})
            case "server":
                return _refusal(500, "out of order")
            case "timeout":
                await asyncio.sleep(HANG)
            case "garbled":
                text = text[: len(text) // 2]
        head = {"id": f"toy-{digest[:12]}", "created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            return StreamingResponse(_events(head, text), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        words = [len(json.dumps(body["messages"]).split()), len(text.split())]
        usage = {"prompt_tokens": words[0], "completion_tokens": words[1], "total_tokens": sum(words)}
        answer = head | {"object": "chat.completion", "choices": [choice], "usage": usage}
        if fault == "malformed":
            return Response(json.dumps(answer)[:80], media_type="application/json")
        return JSONResponse(answer)

    async def models(self, request: Request) -> Response:
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "pgjax"} for name in MODELS]
        return JSONResponse({"object": "list", "data": rows})


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "toy_error", "param": None, "code": None}}, status, headers)


async def _events(head: dict[str, Any], text: str) -> AsyncIterator[str]:
    deltas = [{"role": "assistant", "content": ""}, *({"content": text[n : n + CHUNK]} for n in range(0, len(text), CHUNK)), {}]
    for delta in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        yield f"data: {json.dumps(head | {'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"


def _server(toy: _Toy) -> uvicorn.Server:
    routes = [Route("/v1/chat/completions", toy.chat, methods=["POST"]), Route("/v1/models", toy.models)]
    # Without a log_config: uvicorn's own closes the handlers of others, and absl's takes the standard error with it.
    config = uvicorn.Config(Starlette(routes=routes), log_config=None, log_level="critical", lifespan="off", timeout_graceful_shutdown=0)
    return uvicorn.Server(config)


@contextmanager
def toy_server(port: int = 0, faults: Faults | None = None) -> Iterator[ToyServer]:
    """Serves on this machine until the block ends. Port 0: a free one."""
    toy = _Toy(faults)
    server = _server(toy)
    with socket.create_server(("127.0.0.1", port)) as sock:  # it takes calls from here on: they wait until the thread serves
        thread = threading.Thread(target=partial(server.run, sockets=[sock]), daemon=True)
        thread.start()
        try:
            yield ToyServer(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", toy.calls)
        finally:
            server.should_exit = True
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8100, help="0: a free one")
    port = parser.parse_args().port
    try:
        with toy_server(port) as toy:
            print(f"toy models {', '.join(MODELS)}: {toy.url}", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    except (OSError, OverflowError) as error:
        print(f"toy_server: port {port} cannot be had: {error}; give another --port", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
