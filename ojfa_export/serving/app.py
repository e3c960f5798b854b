"""The application: paths, what answers them, and what they meet before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ojfa_export._version import __version__
from ojfa_export.serving import logs
from ojfa_export.serving.catalogue import Catalogue
from ojfa_export.serving.errors import HttpError
from ojfa_export.serving.front import Front
from ojfa_export.serving.handlers import Handlers
from ojfa_export.serving.keys import Keys
from ojfa_export.serving.metrics import Metrics
from ojfa_export.serving.openapi import document
from ojfa_export.serving.page_files import page_routes
from ojfa_export.serving.settings import Settings


class Server(Front):
    """The application with what it meets first; see `create_app`.

    Attributes:
        starlette: The application behind it.
    """

    def __init__(self, catalogue: Catalogue, settings: Settings) -> None:
        metrics = Metrics(catalogue)
        self.starlette = _application(catalogue, settings, metrics)
        paths = {route.path for route in self.starlette.routes if isinstance(route, Route)}
        super().__init__(self.starlette, Keys(settings.api_keys), metrics, paths)


def create_app(catalogue: Catalogue, settings: Settings | None = None) -> Server:
    """An application of ASGI that serves bundles; closing their engines is the caller's.

    Args:
        catalogue: The bundles; it may be filled while the application runs.
        settings: Of the server.
    """
    return Server(catalogue, settings or Settings())


def _application(catalogue: Catalogue, settings: Settings, metrics: Metrics) -> Starlette:
    handlers = Handlers(catalogue, settings, metrics)

    async def health(_: Request) -> Response:
        ready = catalogue.state == "ready"
        models = {
            name: {
                "running": (stats := served.engine.stats()).running,
                "waiting": stats.waiting,
                **({} if served.watch is None else {"promise_alarm": served.watch.alarm}),
            }
            for name, served in list(catalogue.served.items())
        }
        body: dict[str, Any] = {"status": catalogue.state, "models": models}
        body["alarm"] = any(each.get("promise_alarm") for each in models.values())
        return JSONResponse(body, 200 if ready else 503)

    async def read_metrics(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(_: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    return Starlette(
        routes=[
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/chat/completions", handlers.chat_completions, methods=["POST"]),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{name:path}", handlers.model),
            Route("/tokenize", handlers.tokenize, methods=["POST"]),
            Route("/health", health),
            Route("/metrics", read_metrics),
            Route("/version", version),
            Route("/openapi.json", openapi),
            *page_routes(),
        ],
        exception_handlers={
            HttpError: _refuse,
            HTTPException: _not_there,
            ClientDisconnect: _nobody,
            Exception: _failed,
        },
        lifespan=lambda _: _watching(catalogue),
    )


@asynccontextmanager
async def _watching(catalogue: Catalogue) -> AsyncIterator[None]:
    """Runs the watches of promises while the application runs."""
    task = asyncio.create_task(_watch(catalogue))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(catalogue: Catalogue) -> None:
    while catalogue.state == "loading":
        await asyncio.sleep(0.05)
    watches = [each.watch for each in catalogue.served.values() if each.watch is not None]
    await asyncio.gather(*(watch.run() for watch in watches))


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return error.response()


async def _not_there(request: Request, error: Exception) -> Response:
    """What Starlette refuses: an unknown path, or another method."""
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no path {request.url.path!r}; /openapi.json lists those that are",
        405: f"{request.method} isn't possible here",
    }
    message = messages.get(error.status_code, str(error.detail))
    return HttpError(error.status_code, message, headers=error.headers).response()


async def _nobody(_: Request, __: Exception) -> Response:
    """The client left while it sent its request: nobody reads this."""
    return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
    id = request.scope["ojfa"]["id"]
    logs.failure(error, id=id)
    return HttpError(500, f"the server failed on this request (a bug): {id}").response()
