"""The process: a socket, uvicorn on it, bundles that load beside, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import uvicorn

from ojfa_export.errors import UsageError
from ojfa_export.serving import logs
from ojfa_export.serving.app import Server, create_app
from ojfa_export.serving.catalogue import Catalogue, Served
from ojfa_export.serving.settings import Settings

_LOOK = 0.02  # seconds between two looks at what still runs


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UsageError: The address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"can't listen on {host} port {port}: {error.strerror or error}",
            hint="choose another --port, or 0 for any that is free",
        ) from None
    listening.setblocking(False)
    return listening


def address_of(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `serve`, which answers while it drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def serve(
    listening: socket.socket,
    loaders: Sequence[Callable[[], Served]],
    settings: Settings,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves until SIGTERM or SIGINT, and returns when all has ended.

    Answers at once, with 503 until everything is loaded. After the signal what runs may finish;
    others are told to go elsewhere. A second signal ends at once.

    Args:
        listening: Of `open_socket`.
        loaders: Each opens a bundle.
        settings: Of the server.
        on_ready: Called when requests are taken.

    Raises:
        OjfaError: A bundle can't be opened.
    """
    catalogue = Catalogue()
    try:
        _run(_serve(listening, loaders, settings, catalogue, on_ready))
    finally:
        catalogue.close()
        listening.close()


def _run(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, in the loop that uvicorn chooses: uvloop, where it is installed."""
    factory = uvicorn.Config(app="", log_config=None).get_loop_factory()
    loop = asyncio.new_event_loop() if factory is None else factory()
    try:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main)
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _serve(
    listening: socket.socket,
    loaders: Sequence[Callable[[], Served]],
    settings: Settings,
    catalogue: Catalogue,
    on_ready: Callable[[], None],
) -> None:
    app = create_app(catalogue, settings)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2,
        timeout_keep_alive=30,
    )  # fmt: skip
    server, ended = _Uvicorn(config), asyncio.Event()
    loop, signals = asyncio.get_running_loop(), 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        ended.set()
        if signals > 1:
            server.force_exit = server.should_exit = True

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal)
    running = asyncio.create_task(server.serve([listening]))
    loading = asyncio.create_task(_load(loaders, catalogue, on_ready))
    waiting = asyncio.create_task(ended.wait())
    try:
        await asyncio.wait({loading, waiting, running}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await asyncio.wait({waiting, running}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await _drain(app, catalogue, settings)
    finally:
        waiting.cancel()
        server.should_exit = True
        await running


async def _load(
    loaders: Sequence[Callable[[], Served]], catalogue: Catalogue, on_ready: Callable[[], None]
) -> None:
    """Opens all bundles, each in a thread, one after the other."""
    for load in loaders:
        catalogue.add(await asyncio.to_thread(load))
    if catalogue.state == "loading":
        catalogue.state = "ready"
        on_ready()


async def _drain(app: Server, catalogue: Catalogue, settings: Settings) -> None:
    """Takes nothing more, and waits for what runs; what takes too long is cancelled."""
    catalogue.state = "draining"
    begun, open = time.monotonic(), app.open
    logs.tell("draining", open=open)
    while app.open and time.monotonic() - begun < settings.drain_timeout:
        await asyncio.sleep(_LOOK)
    left = app.open
    if left:
        await asyncio.to_thread(catalogue.close)
        give_up = time.monotonic() + 2
        while app.open and time.monotonic() < give_up:
            await asyncio.sleep(_LOOK)
    logs.tell("drained", finished=open - left, cancelled=left)
