"""Options of an engine that serves, alike in all commands that start or describe one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ojfa_export import backends
from ojfa_export.cli.exit_option import METAVAR_WITH_AUTO, parse_exit_or_auto

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def engine_options(function: Decorated) -> Decorated:
    """How many requests run and wait, in how much memory, for how long, on what, and how deep."""
    for decorate in reversed(
        (
            click.option(
                "--max-sequences",
                type=click.IntRange(min=1),
                metavar="N",
                default=16,
                help="Requests that run at once, of each bundle.",
            ),
            click.option(
                "--kv-cache",
                metavar="SIZE",
                help="Memory for keys and values, such as 4GiB, of each bundle.",
            ),
            click.option(
                "--max-queue",
                type=click.IntRange(min=1),
                metavar="N",
                default=256,
                help="Requests that wait; one more is told to come later.",
            ),
            click.option(
                "--timeout",
                type=click.FloatRange(min=0, min_open=True, max=86400),
                metavar="SECONDS",
                default=600.0,
                help="For a request, the time in the queue included.",
            ),
            click.option(
                "--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to run."
            ),
            click.option(
                "--exit",
                type=parse_exit_or_auto,
                metavar=METAVAR_WITH_AUTO,
                default="full",
                help="Blocks to run where a request doesn't say.",
            ),
        )
    ):
        function = decorate(function)
    return function
