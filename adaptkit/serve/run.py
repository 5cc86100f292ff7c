"""A socket, signals, and a graceful end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["bound", "run"]

GRACE = 30  #: seconds that requests have to end after SIGTERM


def bound(host: str, port: int) -> socket.socket:
    """Take an address before anything slow is done; port 0 is any free one. ``OSError`` says which address is taken,
    ``ValueError`` that a port is none."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: give 0 to {2**16 - 1}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        remedy = "check --host" if isinstance(error, socket.gaierror) else "choose another --port, or 0"
        raise OSError(f"{host}:{port} cannot be listened on: {error}; {remedy}") from error
    return sock


def run(
    app: Any, sock: socket.socket, started: Callable[[], None] = lambda: None, ending: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT: take no new connection, answer what is there, end.

    SIGTERM is what a service is stopped by, and no error; SIGINT is raised again as ``KeyboardInterrupt``.

    Args:
        app: the application.
        sock: where it listens; is closed.
        started: called once requests are answered.
        ending: called before requests are waited for, in the thread of the server.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                started()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            ending()
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it is done
    try:
        server.run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)
        sock.close()
