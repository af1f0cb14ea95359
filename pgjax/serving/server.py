"""The process behind `pgjax serve`: a socket, uvicorn, signals."""

import logging
import math
import signal
import socket
import sys
from types import FrameType

import uvicorn

from pgjax.serving.app import ENDPOINTS, Endpoints, make_app
from pgjax.serving.border import log
from pgjax.serving.desk import Desk


def listen(host: str, port: int) -> socket.socket:
    """A socket that has its address; who connects before the server runs is refused. ValueError where that cannot be."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it; an answer's second part would wait 40 ms
    try:
        sock.bind((host, port))
        return sock
    except (OSError, OverflowError) as error:
        sock.close()
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host} port {port}: {why}; choose another --host or --port") from error


class Server(uvicorn.Server):
    """uvicorn, with the service told at once that it is to stop."""

    def __init__(self, service: Desk, endpoints: Endpoints = ENDPOINTS):
        config = uvicorn.Config(make_app(service, endpoints), lifespan="on", loop="asyncio", http="h11", ws="none", log_config=None)
        config.access_log, config.server_header, config.timeout_graceful_shutdown = False, False, math.ceil(service.serving.drain)
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.ready = False
        super().handle_exit(sig, frame)


def run(service: Desk, sock: socket.socket, endpoints: Endpoints = ENDPOINTS) -> None:
    """Serves until SIGTERM or SIGINT, then answers what it has taken, for `drain` seconds at most."""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    log.propagate = False
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: None)  # uvicorn raises what it caught again when it ends: an end in good order is status 0
    host, port = sock.getsockname()[:2]
    print(f"pgjax: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    Server(service, endpoints).run(sockets=[sock])
