"""`ojfa-export serve`."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.engine_options import engine_options
from ojfa_export.errors import OjfaError, UsageError

if TYPE_CHECKING:
    from ojfa_export.engine.engine import Engine
    from ojfa_export.runtime.model import Model
    from ojfa_export.serving.catalogue import Served
    from ojfa_export.serving.settings import Settings


@define("serve")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", default=8000, help="0 takes a free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys of which a client must send one, a line each.",
)
@engine_options
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0, max=86400),
    metavar="SECONDS",
    default=30.0,
    help="For what runs when the server is told to end.",
)
@click.option(
    "--shadow-share",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    default=0.0,
    help="Share of tokens of 'auto' that are compared with the full model, to watch the promise.",
)
@click.option("--log-prompts", is_flag=True, help="Log what clients send and get.")
def command(
    console: Console,
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    max_sequences: int,
    kv_cache: str | None,
    max_queue: int,
    timeout: float,
    drain_timeout: float,
    backend: str,
    exit: int | str,
    shadow_share: float,
    log_prompts: bool,
) -> None:
    """Serve BUNDLES over HTTP, in the protocol of OpenAI's clients.

    Listens on this machine alone unless --host says otherwise. Ends on SIGTERM, when what runs has
    finished.
    """
    server = _import_server()
    from ojfa_export.engine.budget import read_bytes
    from ojfa_export.serving import logs
    from ojfa_export.serving.catalogue import names_of
    from ojfa_export.serving.keys import read_keys
    from ojfa_export.serving.settings import Settings

    settings = Settings(
        api_keys=() if api_key_file is None else read_keys(api_key_file),
        timeout=timeout,
        exit=exit,
        shadow_share=shadow_share,
        log_prompts=log_prompts,
        drain_timeout=drain_timeout,
    )
    cache_bytes = None if kv_cache is None else read_bytes(kv_cache)
    opening = _Opening(console, backend, settings, max_sequences, cache_bytes, max_queue)
    _check_there(bundles)
    logs.write_to_standard_error()
    names = names_of(bundles)
    loaders = [
        functools.partial(opening.open, name, bundle)
        for name, bundle in zip(names, bundles, strict=True)
    ]
    listening = server.open_socket(host, port)
    address = server.address_of(listening)
    if console.json:
        console.emit({"address": address, "models": names})
    else:
        console.print(f"listening on {address}")
    console.stdout.flush()
    server.serve(listening, loaders, settings, lambda: console.note(f"ready on {address}"))


def _import_server() -> ModuleType:
    """The module of the server.

    Raises:
        OjfaError: A package that it needs is not installed.
    """
    try:
        from ojfa_export.serving import server
    except ModuleNotFoundError as error:
        raise OjfaError(
            f"serving needs {error.name}, which is not installed",
            hint="pip install 'ojfa-export[serve]'",
        ) from error
    return server


@dataclass(frozen=True)
class _Opening:
    """How bundles are opened.

    Attributes:
        console: Says what is being loaded.
        backend: Engines to run.
        settings: Of the server.
        max_sequences: Requests of a bundle that run at once.
        cache_bytes: For keys and values of a bundle; None for what they may need.
        max_queue: Requests that wait.
    """

    console: Console
    backend: str
    settings: Settings
    max_sequences: int
    cache_bytes: int | None
    max_queue: int

    def open(self, name: str, bundle: Path) -> Served:
        """Loads a bundle and makes its engine."""
        from ojfa_export.serving.catalogue import open_served

        begun = time.perf_counter()
        self.console.note(f"loading {bundle}, and replaying its golden tokens")
        served = open_served(
            name,
            bundle,
            backend=self.backend,
            shadow_share=self.settings.shadow_share,
            exit=self.settings.exit,
            make_engine=self._make_engine,
        )
        self.console.note(f"loaded {name} in {time.perf_counter() - begun:.1f} s")
        return served

    def _make_engine(self, model: Model) -> Engine:
        from ojfa_export.engine.engine import Engine

        return Engine(
            model,
            max_sequences=self.max_sequences,
            kv_cache_bytes=self.cache_bytes,
            max_queue=self.max_queue,
        )


def _check_there(bundles: tuple[Path, ...]) -> None:
    """Whoever misspells a name shall not wait for the bundles before it."""
    for bundle in bundles:
        if not bundle.is_dir():
            raise UsageError(f"there is no bundle {bundle}", hint="'ojfa-export build' makes one")
