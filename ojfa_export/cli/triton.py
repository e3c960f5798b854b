"""`ojfa-export triton`."""

from __future__ import annotations

from pathlib import Path

import click

from ojfa_export.cli.checkpoint_options import overwrite_option
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.engine_options import engine_options


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
@engine_options
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
