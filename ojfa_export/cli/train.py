"""`ojfa-export train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ojfa_export.cli.checkpoint_options import ignored_option, overwrite_option
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.errors import resumable
from ojfa_export.cli.readable import readable_seconds


def read_exits(value: str | None) -> tuple[int, ...] | None:
    """Reads "5,10,15"; whether the model has such exits is seen when it is read."""
    if value is None:
        return None
    parts = value.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of exits, such as 5,10,15")
    return tuple(int(part) for part in parts)


@define("train")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="The shortcut to write (safetensors).",
)
@click.option(
    "--jump", default="mlp", metavar="KIND", help="Its kind: mlp, residual, block or draft."
)
@click.option(
    "--width",
    type=int,
    metavar="N",
    help="Of an mlp, a multiple of 8.  [default: that of the model's own]",
)
@click.option(
    "--rank",
    type=int,
    metavar="R",
    help="Of a residual jump.  [default: an eighth of the hidden size]",
)
@click.option(
    "--exits",
    callback=lambda *arguments: read_exits(arguments[-1]),
    metavar="N,N,...",
    help="Of a block jump: exits with a block of their own each.  [default: one block for all]",
)
@click.option(
    "--vocabulary",
    type=int,
    metavar="N",
    help="Of a draft: tokens of a head of its own, the most frequent.  [default: the model's head]",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Text or JSONL to train on; repeatable.  [default: the text that ships]",
)
@click.option(
    "--self-text",
    is_flag=True,
    help="Train on what the model writes, from its chat template and from words of the text.",
)
@click.option("--tokens", default="8M", metavar="N", help="Of text to take, such as 300k or 8M.")
@click.option("--passes", default=3, metavar="N", help="How often the text is read.")
@click.option("--seed", default=0, metavar="N", help="Of all that is random.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where to train.  [default: cuda where there is one]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@ignored_option
@overwrite_option
def command(console: Console, checkpoint: str, output: Path, **settings: Any) -> None:
    """Train a shortcut of CHECKPOINT on much text.

    CHECKPOINT is a Hugging Face model directory or hub id. Takes a GPU if there is one. An
    interrupted training goes on where it stopped when the same command is run again.
    """
    from ojfa_export.training.options import TrainOptions
    from ojfa_export.training.train import train

    options = TrainOptions(checkpoint=checkpoint, output=output, **settings)
    with resumable():
        result = train(options, console.progress())
    if console.json:
        console.emit(result)
    else:
        _show(console, result)


def _show(console: Console, result: dict[str, Any]) -> None:
    """The facts, then agreement and loss of every output."""
    unlisted = ("passes", "seed", "seconds", "tokens_per_second", "held_out_tokens")
    console.facts({name: value for name, value in result.items() if name not in unlisted})
    console.print(
        f"{readable_seconds(result['seconds'])}, {result['tokens_per_second']:,} tokens/s"
    )
    if result["best_step"] == 0:
        console.print("no state was better than the first: the jump is as it was before training")
    console.print()
    console.heading(
        f"Agreement with the full model, and KL in nats, on {result['held_out_tokens']:,} "
        "held-out tokens"
    )
    rows = result["outputs"]
    unit = next(iter(rows[0]))
    columns = {"": "agreement", "chain, ": "chain", "KL, ": "loss"}
    shown = {title: name for title, name in columns.items() if name in rows[0]["jump"]}

    def cell(row: dict[str, Any], when: str, name: str) -> str:
        value = row[when][name]
        return f"{value:.3f}" if name == "loss" else f"{value:.1%}"

    console.table(
        [unit, *(title + when for title in shown for when in ("at first", "trained"))],
        [
            [str(row[unit]), *(cell(row, w, n) for n in shown.values() for w in ("begin", "jump"))]
            for row in rows
        ],
    )
