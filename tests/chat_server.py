"""A real HTTP server that answers chats in OpenAI's form, and fails as it is told to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Answers a chat by `answer`, which gets its body: by itself with its last text in capitals. `script`: what the next calls get instead,
    in order. Either gives a text, or one of the faults that Handler knows."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[dict], Any] = lambda body: last_text(body).upper()
        self.script: list = []
        self.calls: list[tuple[str, dict, dict]] = []  # path, headers, body
        self.held = threading.Semaphore(0)  # calls that hang
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.spec = f"vault/7b@{self.url}"

    def handle_error(self, request, client_address) -> None:
        pass  # who hangs up is part of the tests


def last_text(body: dict) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def completion(text: str, **choice) -> dict:
    found = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | choice
    return {"choices": [found], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.calls.append((self.path, dict(self.headers), body))
            told = self.server.script.pop(0) if self.server.script else None
        match self.server.answer(body) if told is None else told:
            case "hang":
                self.server.held.release()
                self.server.release.wait(60)
                self.close_connection = True
            case "drop":
                self.answer(200, completion(last_text(body).upper()), sent=20)
            case "close":
                self.close_connection = True
            case int() as status, headers:
                self.answer(status, {"error": {"message": f"no {last_text(body)} for {self.headers['Authorization']}"}}, headers)
            case str() as text:
                self.answer(200, completion(text))
            case data:
                self.answer(200, data)

    def answer(self, status: int, body, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:sent])
        self.close_connection = sent is not None


@contextmanager
def chat_server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()
