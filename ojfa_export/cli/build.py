"""`ojfa-export build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ojfa_export import backends
from ojfa_export.cli.checkpoint_options import (
    calibration_options,
    check_option,
    checkpoint_options,
    draft_option,
    graph_options,
    overwrite_option,
    promise_options,
    shortcut_option,
)
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.errors import resumable
from ojfa_export.cli.readable import readable_bytes, readable_seconds

if TYPE_CHECKING:
    from ojfa_export.backends.narrow_cache import CacheStorage


@define("build")
@click.argument("checkpoint")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="BUNDLE", help="Bundle to write."
)
@calibration_options
@shortcut_option
@promise_options
@check_option
@draft_option
@graph_options
@click.option(
    "--max-batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Sequences that may run together.  [default: the recipe's, else 16]",
)
@click.option(
    "--cache",
    type=click.Choice(["fp8"]),
    help="Keep keys and values in this on a GPU.  [default: what products are computed in]",
)
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to build.")
@checkpoint_options
@overwrite_option
@click.option("--skip-verification", is_flag=True, help="Don't compare with the references.")
@click.option("--dry-run", is_flag=True, help="Check all input, say what would be done, and stop.")
def command(
    console: Console,
    checkpoint: str,
    output: Path | None,
    backend: str,
    cache: CacheStorage | None,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Build a bundle from CHECKPOINT.

    CHECKPOINT is a Hugging Face model directory or hub id. Exports graphs, builds engines, fits
    the shortcut and verifies. The bundle is written whole or not at all; an interrupted build goes
    on where it stopped when the same command is run again.

    With an existing bundle in place of CHECKPOINT and without -o, adds a backend's engines to it,
    or builds them again; --cache is theirs. Precision, batch size and cache length are the
    bundle's.
    """
    if output is None:
        _add_engines(console, Path(checkpoint), backend, cache)
        return
    from ojfa_export.compiler import pipeline
    from ojfa_export.compiler.options import BuildOptions

    options = BuildOptions(
        checkpoint=checkpoint, output=output, backend=backend, cache=cache, **settings
    )
    if dry_run:
        _show_plan(console, pipeline.plan(options))
        return
    with resumable():
        result = pipeline.build(options, console.progress())
    document = result.to_json()
    if console.json:
        console.emit(document)
        return
    console.print(result.summary())
    if console.verbosity > 0:
        _show_stages(console, document["stages"])


def _add_engines(console: Console, bundle: Path, backend: str, cache: CacheStorage | None) -> None:
    from ojfa_export.bundle.names import MANIFEST
    from ojfa_export.system.publish import recover

    context = click.get_current_context()
    recover(bundle)
    if not (bundle / MANIFEST).is_file():
        raise click.UsageError("missing option '-o' / '--output'", context)
    for name in context.params:
        if name in ("checkpoint", "backend", "cache", "skip_verification"):
            continue
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(each.opts[-1] for each in context.command.params if each.name == name)
            raise click.UsageError(
                f"{option} can't be changed in a bundle that exists, {bundle}", context
            )
    from ojfa_export.compiler.add_engines import add_engines

    skip = bool(context.params["skip_verification"])
    with resumable():
        result = add_engines(
            bundle, backend, console.progress(), cache=cache, skip_verification=skip
        )
    if console.json:
        console.emit(result)
    else:
        console.facts(result)


def _show_plan(console: Console, plan: dict[str, Any]) -> None:
    if console.json:
        console.emit(plan)
        return
    spec, settings = plan["spec"], plan["settings"]
    console.heading(f"Would build {plan['output']} from {plan['checkpoint']}")
    console.facts(
        {
            "model": f"{spec['family']}, {spec['blocks']} blocks, hidden size "
            f"{spec['hidden_size']}, vocabulary {spec['vocab_size']}",
            "checkpoint size": readable_bytes(plan["checkpoint_bytes"]),
            **{name: value for name, value in settings.items() if name != "calibration_data"},
            "calibration data": ", ".join(settings["calibration_data"]),
            "stages": ", ".join(plan["stages"]),
            "scratch room needed": readable_bytes(plan["scratch_bytes"]),
            "room free": readable_bytes(plan["free_bytes"]),
        }
    )


def _show_stages(console: Console, stages: list[dict[str, Any]]) -> None:
    rows = [
        (
            stage["name"],
            readable_seconds(stage["seconds"]),
            readable_bytes(stage["peak_memory_bytes"]),
            "done before" if stage["resumed"] else "",
        )
        for stage in stages
    ]
    console.print()
    console.table(("stage", "time", "peak memory", ""), rows)
