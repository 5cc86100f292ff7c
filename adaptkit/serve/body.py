"""What comes in: bytes up to a limit, and the images among them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from adaptkit.serve.limits import Limits, Refused

__all__ = ["Bounded", "images_of"]

Message = MutableMapping[str, Any]
#: What curl and other clients say where nobody tells them the type: the bytes are looked at.
UNTOLD = ("", "application/octet-stream", "application/x-www-form-urlencoded")


class Bounded:
    """ASGI middleware: a body that is larger than ``most`` bytes is 413, as soon as that is known."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[Message]], send: Any
    ) -> None:
        """Count what is received."""
        if scope["type"] != "http" or scope["path"].startswith("/ui"):  # Gradio has limits of its own
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        seen = int(told) if told.isdigit() else 0
        counted = 0

        async def bounded() -> Message:
            nonlocal counted
            message = await receive()
            counted += len(message.get("body", b""))
            if max(counted, seen) > self.most:
                raise HTTPException(413, f"the body is larger than {self.most:,} bytes, which is the limit")
            return message

        await self.app(scope, bounded, send)


async def images_of(request: Request, limits: Limits) -> list[bytes]:
    """Return the images of a request: its body, or the files of a form.

    Raises :class:`Refused`: 400 where there is none, 413 where there are too many, 415 for another media type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _files(request, limits)
    if not kind.startswith("image/") and kind not in UNTOLD:
        raise Refused(
            415, f"Content-Type: {kind[:80]}: send an image as the body (image/jpeg, image/png, ...), or "
            "multipart/form-data with one or more files"
        )  # fmt: skip
    data = await request.body()
    if not data:
        raise Refused(400, "the body is empty: send an image, e.g. curl --data-binary @photo.jpg")
    return [data]


async def _files(request: Request, limits: Limits) -> list[bytes]:
    try:
        form = await request.form(max_files=limits.images, max_fields=64)
    except HTTPException as error:
        if "Too many files" in str(error.detail):
            raise Refused(413, f"more than {limits.images} images in a request, which is the limit") from error
        raise
    try:
        found = [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    finally:
        await form.close()
    if not found:
        raise Refused(400, "the form has no file: send e.g. curl -F image=@photo.jpg")
    return found
