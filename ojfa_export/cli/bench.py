"""`ojfa-export bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console, readable_bytes
from ojfa_export.cli.exit_option import METAVAR, parse_exit

if TYPE_CHECKING:
    from ojfa_export.measure.bench import BenchResult
    from ojfa_export.runtime.session import Exit


@define("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--exit",
    "exits",
    type=parse_exit,
    metavar=METAVAR,
    multiple=True,
    help="Exit to measure; repeatable.  [default: every exit]",
)
@click.option(
    "--prompt-length",
    type=click.IntRange(min=1),
    metavar="N",
    default=128,
    help="Tokens before the measured ones.",
)
@click.option(
    "--warmup", type=click.IntRange(min=0), metavar="N", default=10, help="Steps not counted."
)
@click.option(
    "--iterations", type=click.IntRange(min=1), metavar="N", default=50, help="Steps counted."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Save the JSON document here too.",
)
def command(
    console: Console,
    bundle: Path,
    exits: tuple[Exit, ...],
    prompt_length: int,
    warmup: int,
    iterations: int,
    output: Path | None,
) -> None:
    """Measure the latency of BUNDLE at every exit, on this machine.

    The number of threads is set by OJFA_THREADS.
    """
    from ojfa_export.measure.bench import bench_bundle
    from ojfa_export.shortcut.atomic import check_writable, write_atomically

    if output is not None:
        check_writable(output)
    result = bench_bundle(bundle, exits, prompt_length, warmup, iterations, console.progress())
    document = result.to_json()
    if output is not None:
        write_atomically(output, (json.dumps(document, indent=2) + "\n").encode())
    if console.json:
        console.emit(document)
        return
    _show(console, result)


def _show(console: Console, result: BenchResult) -> None:
    machine = result.machine
    console.facts(
        {
            "CPU": f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
            "read bandwidth": readable_bytes(machine["bandwidth_bytes_per_second"])
            + "/s, measured",
            "prompt": f"{result.settings.prompt_length} tokens",
        }
    )
    console.print()
    console.table(
        ("exit", "decode ms", "p95", "tokens/s", "prefill ms", "p95", "tokens/s", "reads",
         "of bandwidth"),
        [
            (
                str(row.blocks),
                f"{row.decode_ms_median:.3f}",
                f"{row.decode_ms_p95:.3f}",
                f"{row.tokens_per_second:.1f}",
                f"{row.prefill_ms_median:.2f}",
                f"{row.prefill_ms_p95:.2f}",
                f"{row.prefill_tokens_per_second:.0f}",
                readable_bytes(row.bytes_touched),
                f"{100 * row.bandwidth_share:.0f}%",
            )
            for row in result.exits
        ],
    )  # fmt: skip
