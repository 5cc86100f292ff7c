"""Connections that a page holds open for as long as it is looked at, let go when the server is told to end.

Gradio's clients keep ``/gradio_api/heartbeat/...`` open: a response without an end, for which a graceful end would wait
until its time is over. Answers are not among them: the stream of a question ends with its answer, and is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

__all__ = ["Endless", "Streams"]

HEARTBEAT = "/gradio_api/heartbeat/"


class Streams:
    """Responses without an end that are being sent."""

    def __init__(self) -> None:
        self.sent: set[asyncio.Task[None]] = set()
        self.ended = False

    def end(self) -> None:
        """End them, and those that come; to be called in the thread of the server."""
        self.ended = True
        for task in self.sent:
            task.cancel()


class Endless:
    """ASGI middleware: the heartbeats of a page are kept in ``streams``, and end in order when these are ended."""

    def __init__(self, app: Any, streams: Streams) -> None:
        self.app, self.streams = app, streams

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Pass everything else on."""
        if scope["type"] != "http" or HEARTBEAT not in scope["path"] or self.streams.ended:
            await self.app(scope, receive, send)
            return
        begun = over = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal begun, over
            begun = True
            over = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        task = asyncio.ensure_future(self.app(scope, receive, sending))
        self.streams.sent.add(task)
        try:
            await task
        except asyncio.CancelledError:
            if not self.streams.ended:  # the server's own doing
                task.cancel()
                raise
            if not begun:
                await send({"type": "http.response.start", "status": 503, "headers": []})
            if not over:
                await send({"type": "http.response.body", "body": b""})
        finally:
            self.streams.sent.discard(task)
