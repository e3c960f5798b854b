"""What every command shares: the options that say how to speak, and its console."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from ojfa_export.cli.console import Console

Function = Callable[..., "int | None"]


def command(name: str) -> Callable[[Function], click.Command]:
    """Makes a command of a function that takes the console, then its own parameters.

    The function returns its exit status; None is 0.
    """

    def decorate(function: Function) -> click.Command:
        @functools.wraps(function)
        def invoke(*args: Any, **kwargs: Any) -> int | None:
            console = click.get_current_context().ensure_object(Console)
            with console.reserved_stdout():
                return function(console, *args, **kwargs)

        made = click.command(name)(invoke)
        made.params.extend(common_options())
        return made

    return decorate


def common_options() -> list[click.Parameter]:
    """Options that are taken before and after a command's name."""
    return [
        _speech("--json", "Write one JSON document to standard output.", json=True),
        _speech("-v", "--verbose", "Say more.", verbosity=1),
        _speech("-q", "--quiet", "Write nothing to standard error but errors.", verbosity=-1),
        _speech("--debug", "Show the traceback of an error.", debug=True),
    ]


def _speech(*names_and_help: str, **setting: Any) -> click.Option:
    """A flag that changes the console; eager, so that it holds for errors in the other options."""
    *names, text = names_and_help

    def apply(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        console = ctx.ensure_object(Console)
        for key in setting if value else ():
            setattr(console, key, setting[key])

    return click.Option(
        names,
        is_flag=True,
        is_eager=True,
        expose_value=False,
        show_default=False,
        callback=apply,
        help=text,
    )
