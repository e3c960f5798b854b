"""`ojfa-export triton`."""

from __future__ import annotations

from pathlib import Path

import click

from ojfa_export import backends
from ojfa_export.cli.checkpoint_options import overwrite_option
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.exit_option import METAVAR_WITH_AUTO, parse_exit_or_auto


@define("triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="REPOSITORY",
    required=True,
    help="Model repository: a folder with one for each model.",
)
@click.option("--name", metavar="NAME", help="Of the model; without it the bundle's.")
@click.option("--link", is_flag=True, help="Link to the bundle instead of copying it.")
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to run.")
@click.option(
    "--max-sequences",
    type=click.IntRange(min=1),
    metavar="N",
    default=16,
    help="Requests that run at once.",
)
@click.option("--kv-cache", metavar="SIZE", help="Memory for keys and values, such as 4GiB.")
@click.option(
    "--max-queue",
    type=click.IntRange(min=1),
    metavar="N",
    default=256,
    help="Requests that wait; one more is told to come later.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86400),
    metavar="SECONDS",
    default=600.0,
    help="For a request, the time in the queue included.",
)
@click.option(
    "--exit",
    type=parse_exit_or_auto,
    metavar=METAVAR_WITH_AUTO,
    default="full",
    help="Blocks to run where a request doesn't say.",
)
@overwrite_option
def command(
    console: Console,
    bundle: Path,
    output: Path,
    name: str | None,
    link: bool,
    backend: str,
    max_sequences: int,
    kv_cache: str | None,
    max_queue: int,
    timeout: float,
    exit: int | str,
    overwrite: bool,
) -> None:
    """Add BUNDLE to a model repository of NVIDIA's Triton server."""
    from ojfa_export.engine.budget import read_bytes
    from ojfa_export.serving.triton_repository import TritonSettings, write_repository

    settings = TritonSettings(
        backend=backend,
        max_sequences=max_sequences,
        kv_cache=None if kv_cache is None else read_bytes(kv_cache),
        max_queue=max_queue,
        timeout=timeout,
        exit=exit,
    )
    model = write_repository(bundle, output, settings, name=name, link=link, overwrite=overwrite)
    if console.json:
        console.emit({"model": str(model), "name": model.name})
    else:
        console.print(f"{model}: start it with 'tritonserver --model-repository {output}'")
