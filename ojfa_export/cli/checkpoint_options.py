"""Options of the commands that read a checkpoint: build, calibrate and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from ojfa_export.models.precision import Precision

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]


ignored_option: Decorator[Any] = click.option(
    "--ignore-config-field",
    "ignore_config_fields",
    multiple=True,
    metavar="NAME",
    help="Go on although this field of config.json is not understood; repeatable.",
)


def checkpoint_options(function: Decorated) -> Decorated:
    """Where the checkpoint comes from, and settings for it."""
    for decorate in (
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Let transformers run code that comes with the checkpoint (verification only).",
        ),
        ignored_option,
        click.option(
            "--recipe", metavar="NAME|FILE", help="Settings for a published model, or a TOML file."
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
    ):
        function = decorate(function)
    return function


def calibration_options(function: Decorated) -> Decorated:
    """What the shortcut is fitted on, and its rank."""
    for decorate in (
        click.option(
            "--rank",
            type=int,
            metavar="R",
            help="Rank of the shortcut.  [default: the paper's, hidden size / 100]",
        ),
        click.option(
            "--calibration-tokens", type=int, metavar="N", help="Tokens of that text to use."
        ),
        click.option(
            "--calibration-data",
            type=click.Path(path_type=Path),
            multiple=True,
            metavar="[DOMAIN=]FILE",
            help="Text or JSONL to calibrate with; repeatable.  [default: the text that ships]",
        ),
    ):
        function = decorate(function)
    return function


check_option: Decorator[Any] = click.option(
    "--check-vocabulary",
    type=int,
    metavar="N",
    help="Check exits that decide by a head of the N most frequent tokens; 0 for the whole head.  "
    "[default: 4096 with a promise, where the head is large]",
)

draft_option: Decorator[Any] = click.option(
    "--draft-vocabulary",
    type=int,
    metavar="N",
    help="Give a draft layer without a head of its own one of the N most frequent tokens; 0 for "
    "the model's.  [default: 8192, where the model's is large]",
)


def promise_options(function: Decorated) -> Decorated:
    """What is to be promised of exits that are chosen per token."""
    for decorate in (
        click.option(
            "--self-text-windows",
            type=click.IntRange(min=1),
            metavar="N",
            help="Windows that it writes.  [default: four times what the promise needs]",
        ),
        click.option(
            "--self-text",
            type=click.Choice(["alone", "beside"]),
            help="Make the promise on text that the model writes: on that alone, or beside the "
            "calibration data.",
        ),
        click.option(
            "--max-extra-surprisal",
            type=float,
            metavar="NATS",
            help="Also promise this of the mean extra surprisal.",
        ),
        click.option(
            "--confidence",
            type=float,
            metavar="SHARE",
            help="Of the promise, over the draw of calibration text.  [default: 0.95]",
        ),
        click.option(
            "--max-disagreement",
            type=float,
            metavar="SHARE",
            help="Promise that with --exit auto at most this share of the tokens differs from the "
            "full model's choice, in every domain.",
        ),
    ):
        function = decorate(function)
    return function


def graph_options(function: Decorated) -> Decorated:
    """Decisions that are fixed in the graphs."""
    for decorate in (
        click.option(
            "--max-cache-length",
            type=click.IntRange(min=1),
            metavar="N",
            help="Tokens that a sequence may hold.  [default: the model's positions, at most 4096]",
        ),
        click.option(
            "--precision",
            type=click.Choice(get_args(Precision)),
            help="Of the weights.  [default: the recipe's, else fp32]",
        ),
        click.option(
            "--group-size",
            type=int,
            metavar="N",
            help="Quantised weights that share a scale: 16, 32, 64, 128 or 256.  "
            "[default: 32 on the CPU, 128 on a GPU]",
        ),
        click.option(
            "--weights",
            type=click.Choice(["int4", "int8", "fp8"]),
            help="Quantise blocks' matrices and heads, for the onnxruntime backend in fp32 and for "
            "tensorrt in fp16 or bf16; fp8 for tensorrt alone.",
        ),
    ):
        function = decorate(function)
    return function


overwrite_option: Decorator[Any] = click.option(
    "--overwrite", is_flag=True, help="Replace what is at the output."
)

kind_option: Decorator[Any] = click.option(
    "--shortcut",
    type=click.Choice(["ojfa", "residual"]),
    help="Kind of shortcut.  [default: the better one of this rank, as measured]",
)

shortcut_option: Decorator[Any] = click.option(
    "--shortcut",
    multiple=True,
    metavar="ojfa|residual|FILE|DIR",
    help="Kind of shortcut, or one that 'train' or 'calibrate' wrote; repeatable for a draft layer "
    "beside it, of a file or an EAGLE-3 directory.  "
    "[default: the better one of this rank, as measured]",
)
