"""The program: finds the command, runs it, and turns whatever happens into an exit status."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from ojfa_export._version import __version__
from ojfa_export.cli.command import common_options
from ojfa_export.cli.console import Console
from ojfa_export.cli.errors import noticing_readers, report
from ojfa_export.errors import ExitStatus

PROGRAM = "ojfa-export"
# In the order in which they are used. Each is a module beside this one.
COMMANDS = (
    "build",
    "calibrate",
    "train",
    "compare",
    "export",
    "verify",
    "run",
    "chat",
    "serve",
    "triton",
    "plan",
    "monitor",
    "bench",
    "inspect",
    "families",
    "doctor",
)


class App(click.Group):
    """The group of all commands; a command's module is imported when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"ojfa_export.cli.{cmd_name}").command
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Reads the command line."""
        with noticing_readers():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; what it wrote is out, or known to be lost, when this returns."""
        with noticing_readers():
            status = super().invoke(ctx)
            sys.stdout.flush()
        return status

    def main(self, args: Any = None, *_: Any, **__: Any) -> NoReturn:
        """Runs the command line and leaves the process."""
        _replace_closed_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that can't show a character shows its code rather than nothing.
            sys.stdout.reconfigure(errors="backslashreplace")
        args = sys.argv[1:] if args is None else list(args)
        console = Console()
        try:
            status = super().main(args, PROGRAM, standalone_mode=False, obj=console)
        except SystemExit:
            raise
        except BaseException as error:  # native modules raise some that are no Exception
            if isinstance(error, click.UsageError) and "--json" in args:
                console.json = True  # the parser may have stopped before it came to that
            status = report(error, console)
        _give_up_streams()
        sys.exit(int(status or ExitStatus.OK))


def _replace_closed_streams() -> None:
    """Where the caller closed a stream, what is written there is meant for nobody.

    The descriptor is taken as well, so that no file opened later gets its number and, with it, the
    messages of native code.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()


def _give_up_streams() -> None:
    """Drops what can't be written, which the interpreter would complain of once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


@click.group(
    cls=App,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "--cmake-dir",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, wanted: _show_cmake_directory(ctx, wanted),
    help="Show where find_package(ojfa CONFIG) finds the C++ runtime, and exit.",
)
@click.pass_context
def app(ctx: click.Context) -> None:
    """Compile a Hugging Face language model into a bundle that exits early, and run it."""
    if ctx.invoked_subcommand is None:
        if ctx.ensure_object(Console).json:
            raise click.UsageError("missing command", ctx)
        click.echo(ctx.get_help(), err=True)
        ctx.exit(ExitStatus.USAGE)


app.params.extend(common_options())


def _show_cmake_directory(ctx: click.Context, wanted: bool) -> None:
    from ojfa_export.system.cmake import cmake_directory

    if wanted:
        click.echo(cmake_directory())
        ctx.exit()


def main() -> NoReturn:
    """Runs the command line with the process's arguments."""
    app.main()
