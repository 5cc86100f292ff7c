"""The routes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from adaptkit.predict.tasks import Asked
from adaptkit.serve.body import Bounded, images_of
from adaptkit.serve.docs import ICON, docs_page
from adaptkit.serve.limits import Refused
from adaptkit.serve.reply import PNG, chosen, picture, png, said
from adaptkit.serve.service import Service
from adaptkit.serve.streams import Endless
from adaptkit.version import __version__

__all__ = ["create_app"]

log = logging.getLogger("adaptkit.serve")

FILE = {"type": "string", "format": "binary"}
FORM = {"type": "object", "properties": {"image": {"type": "array", "items": FILE}}}
IMAGES = {
    "requestBody": {"required": True, "content": {
        "image/*": {"schema": FILE},
        "multipart/form-data": {"schema": FORM},
    }},
}  # fmt: skip
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "not an image"}, 404: {"description": "no such task"},
    406: {"description": "no such kind of answer"}, 413: {"description": "too large"},
    415: {"description": "not a media type of an image"}, 503: {"description": "full, or stopping: try again"},
}  # fmt: skip
AS_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer", "content": {PNG: {}, "application/json": {}}}, **ERRORS,
}  # fmt: skip

Threshold = Annotated[float, Query(ge=0, le=1, description="least score of an object of a detector")]
WithPng = Annotated[bool, Query(description="add the PNG to the JSON, in base64")]
Draw = Annotated[bool, Query(description="of a PNG: the answer drawn over the picture, with a legend")]


class Mount(BaseModel):
    """What to mount."""

    file: str  #: a saved folder on the server's disk, or org/name on the Hub


def create_app(service: Service) -> FastAPI:
    """Return the application; when it shuts down, what is queued is answered and the worker ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="adaptkit serve", version=__version__, lifespan=lifespan,
                  docs_url=None, redoc_url=None,
                  description="One resident backbone, many adapters.")  # fmt: skip
    app.add_middleware(Bounded, most=service.limits.body)
    app.add_middleware(Endless, streams=service.streams)
    _errors(app)
    _about(app, service)
    _adapters(app, service)
    _predict(app, service)
    return app


def _errors(app: FastAPI) -> None:
    """Every error is JSON: ``{"detail": why}``."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Any) -> Response:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"detail": error.why}, error.status, headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"detail": "the server failed; its log says how"}, 500)


def _about(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return RedirectResponse("/docs")

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> Response:
        mounted = [one.json() for one in service.mounts.all.values()]
        has_page = any(getattr(route, "path", "") == "/ui" for route in app.routes)
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url).rstrip("/"), mounted, has_page))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")

    @app.get("/healthz", summary="Whether it answers")
    async def health() -> Response:
        ready = service.worker.is_ready
        body = {"status": "ok" if ready else "stopping", "adapters": list(service.mounts.all), "version": __version__}
        return JSONResponse(body, 200 if ready else 503)

    @app.get("/metrics", summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(service.mounts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _adapters(app: FastAPI, service: Service) -> None:
    @app.get("/adapters", summary="What is mounted")
    async def mounted() -> dict[str, Any]:
        return {"adapters": [one.json() for one in service.mounts.all.values()]}

    @app.post("/adapters/{name}", status_code=201, summary="Mount a file", responses={
        403: {"description": "not allowed"}, 409: {"description": "the name is taken"}})  # fmt: skip
    def mount(name: str, what: Mount) -> dict[str, Any]:  # in a thread: it may download
        return service.mount(name, what.file).json()

    @app.delete("/adapters/{name}", status_code=204, summary="Unmount", responses={403: {"description": "not allowed"}})
    def unmount(name: str) -> None:
        service.unmount(name)


def _predict(app: FastAPI, service: Service) -> None:
    @app.post("/predict/{task}", summary="One task: JSON or PNG, by Accept", openapi_extra=IMAGES, responses=AS_PICTURE)
    async def predict(
        request: Request, task: str, threshold: Threshold = 0.5, png: WithPng = False, draw: Draw = False
    ) -> Response:
        label = task if task in service.mounts.all else "unknown"
        return await _counted(service, label, _one(service, request, task, threshold, png, draw))

    @app.post("/predict", summary="Several tasks on one pass: JSON", openapi_extra=IMAGES, responses=ERRORS)
    async def together(
        request: Request, tasks: Annotated[str, Query(description="names, with commas; default: all")] = "",
        threshold: Threshold = 0.5, png: WithPng = False,
    ) -> Response:  # fmt: skip
        return await _counted(service, "several", _several(service, request, tasks, threshold, png))


async def _one(service: Service, request: Request, task: str, threshold: float, with_png: bool, draw: bool) -> Response:
    service.mounts.of(task)
    kind = chosen(request.headers.get("accept"))
    with service.gate.request():
        images = await images_of(request, service.limits)
        if kind == PNG and len(images) > 1:
            raise Refused(406, f"{len(images)} images and one PNG: send them one by one, or Accept: application/json")
        found = await service.answers(images, [task], Asked(threshold=threshold))
        if kind == PNG:
            image, answers = found[0]
            data = await asyncio.to_thread(lambda: png(picture(answers[task], image, draw)))
            return Response(data, media_type=PNG, headers={"Vary": "Accept"})
        words = await asyncio.to_thread(
            lambda: [{"task": task, **said(answers[task], with_png, image)} for image, answers in found]
        )
    return JSONResponse(words[0] if len(words) == 1 else words, headers={"Vary": "Accept"})


async def _several(service: Service, request: Request, tasks: str, threshold: float, with_png: bool) -> Response:
    if chosen(request.headers.get("accept")) == PNG:
        raise Refused(406, "several tasks are no picture: Accept: application/json, or POST /predict/<task>")
    names = list(dict.fromkeys(n.strip() for n in tasks.split(",") if n.strip())) or list(service.mounts.all)
    with service.gate.request():
        images = await images_of(request, service.limits)
        found = await service.answers(images, names, Asked(threshold=threshold))
        words = await asyncio.to_thread(
            lambda: [{n: said(a, with_png, image) for n, a in answers.items()} for image, answers in found]
        )
    return JSONResponse(words[0] if len(words) == 1 else words)


async def _counted(service: Service, label: str, work: Awaitable[Response]) -> Response:
    """Wait for a response and count it, or the error in its place."""
    began, status = time.perf_counter(), 499  # the client went away
    try:
        response = await work
        status = response.status_code
        return response
    except Refused as error:
        status = error.status
        raise
    except HTTPException as error:
        status = error.status_code
        raise
    except Exception:
        status = 500
        log.exception("a request failed")
        raise
    finally:
        service.mounts.metrics.answered(label, status, time.perf_counter() - began)
