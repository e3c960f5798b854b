"""The server under Ray Serve: `serve run` with `ojfa_export.serving.ray_app:app`.

A replica is a process with an engine for each bundle, and answers HTTP as `ojfa-export serve` does.
Ray starts replicas, sends each request to one of them, and starts another where one dies. See
docs/serving.md for the file that `serve run` takes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from ojfa_export import backends
from ojfa_export.engine.budget import read_bytes
from ojfa_export.engine.engine import Engine
from ojfa_export.errors import OverloadedError, UsageError
from ojfa_export.runtime.model import Model
from ojfa_export.serving import logs
from ojfa_export.serving.app import Server, create_app
from ojfa_export.serving.catalogue import Catalogue, Served, open_served
from ojfa_export.serving.keys import read_keys
from ojfa_export.serving.settings import Settings

# Seconds in which the engine must answer a request of `check_health`.
_PROBE = 20.0


class Arguments(BaseModel):
    """What `args` of an application may hold; of the options of `ojfa-export serve`.

    Attributes:
        bundles: Directories by the names that clients ask for, the same on every host. A name
            stays when a bundle is replaced by one in another directory.
        backend: Engines to run.
        max_sequences: Requests that run at once, of each bundle in each replica.
        kv_cache: Memory for keys and values, such as "4GiB".
        max_queue: Requests that wait in a replica; one more is told to come later.
        timeout: Seconds that a request may take.
        exit: Blocks to run where a request doesn't say.
        shadow_share: Share of tokens that are compared with the full model.
        api_key_file: Keys of which a client must send one.
        log_prompts: Whether logs hold what clients send and get.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Annotated[dict[str, Path], Field(min_length=1)]
    backend: str = backends.DEFAULT
    max_sequences: Annotated[int, Field(ge=1)] = 16
    kv_cache: str | None = None
    max_queue: Annotated[int, Field(ge=1)] = 256
    timeout: Annotated[float, Field(gt=0, le=86400)] = 600.0
    exit: Annotated[int, Field(ge=1)] | Literal["full", "auto"] = "full"
    shadow_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    api_key_file: Path | None = None
    log_prompts: bool = False


def app(args: dict[str, Any]) -> serve.Application:
    """Builds the application; `serve run` and `serve deploy` call it with the file's `args`.

    Args:
        args: See `Arguments`.

    Raises:
        UsageError: They are wrong.
    """
    arguments = read_arguments(args)
    # More than the engine runs, so that its next request is there when one ends. What comes beyond
    # waits at the proxy, for whichever replica is free first.
    ongoing = 2 * arguments.max_sequences
    return bundles.options(max_ongoing_requests=ongoing).bind(arguments.model_dump(mode="json"))


def read_arguments(args: dict[str, Any]) -> Arguments:
    """Checks what doesn't need the bundles, which other hosts have.

    Raises:
        UsageError: Something is wrong, and what.
    """
    hint = "docs/serving.md shows a file for 'serve run'"
    try:
        arguments = Arguments.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"args: {where}: {first['msg'].lower()}", hint=hint) from None
    paths = [*arguments.bundles.values(), *filter(None, [arguments.api_key_file])]
    relative = [path for path in paths if not path.is_absolute()]
    if relative:
        raise UsageError(
            f"args: {relative[0]} is no absolute path",
            hint="replicas run in directories of their own; give the path from / on",
        )
    return arguments


class Replica:
    """One process: it opens the bundles, and Ray sends it requests.

    Args:
        args: Of `app`.

    Raises:
        OjfaError: A bundle can't be opened; Ray shows it in `serve status`.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        self._arguments = arguments = read_arguments(args)
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
        if cores:  # ONNX Runtime would take all of the host's, as each of its replicas
            os.environ.setdefault("OJFA_THREADS", str(cores))
        logs.write_to_standard_error()
        self._failed = dict.fromkeys(arguments.bundles, 0)
        self._catalogue = Catalogue(
            [self._open(name, bundle) for name, bundle in arguments.bundles.items()]
        )

    def __serve_build_asgi_app__(self) -> Server:
        """The application that Ray gives requests to."""
        arguments = self._arguments
        key_file = arguments.api_key_file
        settings = Settings(
            api_keys=() if key_file is None else read_keys(key_file),
            timeout=arguments.timeout,
            exit=arguments.exit,
            shadow_share=arguments.shadow_share,
            log_prompts=arguments.log_prompts,
        )
        return create_app(self._catalogue, settings)

    async def check_health(self) -> None:
        """Ray asks every some seconds, and replaces a replica that raises three times on end.

        Only where requests have failed since is the engine asked for a token.

        Raises:
            OjfaError: It gives none.
        """
        for name, served in self._catalogue.served.items():
            failed = served.engine.stats().finished.get("error", 0)
            if failed == self._failed[name]:
                continue
            self._failed[name] = failed
            try:
                await served.engine.submit([0], max_new_tokens=1, timeout=_PROBE)
            except OverloadedError:  # it is busy, so it works
                continue

    def _open(self, name: str, bundle: Path) -> Served:
        arguments = self._arguments
        return open_served(
            name,
            bundle,
            backend=arguments.backend,
            shadow_share=arguments.shadow_share,
            exit=arguments.exit,
            make_engine=self._make_engine,
        )

    def _make_engine(self, model: Model) -> Engine:
        arguments = self._arguments
        return Engine(
            model,
            max_sequences=arguments.max_sequences,
            kv_cache_bytes=None if arguments.kv_cache is None else read_bytes(arguments.kv_cache),
            max_queue=arguments.max_queue,
        )


# Ray's deployment, for Python programs: `bundles.options(num_replicas=2).bind({"bundles": ...})`.
bundles = serve.deployment(serve.ingress()(Replica), name="bundles")
