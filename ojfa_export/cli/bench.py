"""`ojfa-export bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ojfa_export import backends
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console, describe_hardware
from ojfa_export.cli.exit_option import METAVAR_WITH_AUTO, parse_exit_or_auto
from ojfa_export.cli.readable import readable_bytes
from ojfa_export.errors import UsageError

if TYPE_CHECKING:
    from ojfa_export.decoding.options import ExitChoice
    from ojfa_export.planning.bench import BenchResult
    from ojfa_export.planning.reading import ReadingResult

# Steps of an exit, and tokens of a text, where none are asked for: exits per token and drafts
# take other times on other tokens.
ITERATIONS, TEXT_TOKENS = 50, 1024


@define("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--exit",
    "exits",
    type=parse_exit_or_auto,
    metavar=METAVAR_WITH_AUTO,
    multiple=True,
    help="Exit to measure; repeatable. 'auto' needs --text.  [default: every exit]",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measure milliseconds per token while reading this text: exits that decide for each "
    "token, and speculation, too.",
)
@click.option("--speculate", is_flag=True, help="Measure speculation; needs --text.")
@click.option(
    "--draft-exit", type=click.IntRange(min=1), metavar="N", help="Blocks that draft [half]."
)
@click.option(
    "--draft-length", type=click.IntRange(min=1), metavar="N", help="Tokens per draft [adapted]."
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
    "--iterations",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Steps counted, tokens of a text.  [default: {ITERATIONS}, of a text {TEXT_TOKENS}]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Save the JSON document here too.",
)
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to time.")
def command(
    console: Console,
    bundle: Path,
    exits: tuple[ExitChoice, ...],
    text: Path | None,
    speculate: bool,
    draft_exit: int | None,
    draft_length: int | None,
    prompt_length: int,
    warmup: int,
    iterations: int | None,
    output: Path | None,
    backend: str,
) -> None:
    """Measure the latency of BUNDLE at every exit, on this machine.

    The number of threads is set by OJFA_THREADS.
    """
    if not speculate and (draft_exit, draft_length) != (None, None):
        raise UsageError(
            "--draft-exit and --draft-length are settings of speculation", hint="add --speculate"
        )
    from ojfa_export.system.atomic import check_writable

    if output is not None:
        check_writable(output)
    if text is not None:
        from ojfa_export.decoding.speculation import Speculation
        from ojfa_export.planning.reading import read_bundle

        speculation = Speculation(draft_exit, draft_length) if speculate else None
        reading = read_bundle(
            bundle, text, exits, speculation, prompt_length, iterations or TEXT_TOKENS,
            console.progress(), backend,
        )  # fmt: skip
        _emit(console, reading.to_json(), output, lambda: _show_reading(console, reading))
    else:
        fixed = [exit for exit in exits if exit == "full" or isinstance(exit, int)]
        if speculate or len(fixed) < len(exits):
            raise UsageError(
                "exits that decide for each token, and speculation, are measured on a text",
                hint="add --text FILE",
            )
        from ojfa_export.planning.bench import bench_bundle

        result = bench_bundle(
            bundle,
            fixed,
            prompt_length,
            warmup,
            iterations or ITERATIONS,
            console.progress(),
            backend,
        )
        _emit(console, result.to_json(), output, lambda: _show(console, result))


def _emit(
    console: Console, document: dict[str, Any], output: Path | None, show: Callable[[], None]
) -> None:
    from ojfa_export.system.atomic import write_atomically

    if output is not None:
        write_atomically(output, (json.dumps(document, indent=2) + "\n").encode())
    if console.json:
        console.emit(document)
    else:
        show()


def _show_reading(console: Console, result: ReadingResult) -> None:
    _show_machine(console, result.machine, {"read": f"{result.tokens:,} tokens, each way"})
    full = result.ways["full"].ms_per_token
    console.table(
        ("way", "ms/token", "of full", "agrees", "blocks/token", "tokens/pass"),
        [
            (
                name,
                f"{way.ms_per_token:.3f}",
                f"{100 * way.ms_per_token / full:.0f}%",
                f"{100 * way.agreement:.1f}%",
                f"{way.blocks:.1f}",
                f"{way.tokens_per_pass:.2f}",
            )
            for name, way in result.ways.items()
        ],
    )


def _show_machine(console: Console, machine: dict[str, Any], facts: dict[str, str]) -> None:
    console.facts({**describe_hardware(machine), **facts})
    console.print()


def _show(console: Console, result: BenchResult) -> None:
    bandwidth = readable_bytes(result.machine["bandwidth_bytes_per_second"])
    _show_machine(
        console,
        result.machine,
        {
            "bandwidth": f"{bandwidth}/s, measured by "
            + ("copying on the device" if "device" in result.machine else "reading"),
            "prompt": f"{result.settings.prompt_length} tokens",
        },
    )
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
