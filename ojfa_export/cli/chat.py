"""`ojfa-export chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ojfa_export import backends
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.generation_options import generation_options, read_options
from ojfa_export.errors import ExitStatus, UsageError

if TYPE_CHECKING:
    from ojfa_export.engine.request import Request


@define("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="What the system message says.")
@generation_options
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to run.")
def command(
    console: Console, bundle: Path, system: str | None, backend: str, **arguments: Any
) -> int:
    """Chat with BUNDLE.

    Reads questions from standard input, a line each, and answers each after all that was said
    before. Ctrl-C ends an answer, Ctrl-D the chat.
    """
    asked = read_options(**arguments)
    import ojfa_export

    model = ojfa_export.load(bundle, backend=backend)
    options = model.resolve_default(model.chats.ending(asked))
    messages = [] if system is None else [{"role": "system", "content": system}]
    # The engine keeps what it has computed of the chat so far.
    with ojfa_export.Engine(model, max_sequences=1) as engine:
        failed = False
        for question in _questions(console):
            asked_now = [*messages, {"role": "user", "content": question}]
            try:
                request = engine.submit(model.chats.encode(asked_now), options)
            except UsageError as error:  # of this question: the chat goes on without it
                console.complain(error.message, "error:")
                console.complain("ask something else or shorter, or begin a new chat", "hint:")
                failed = True
                continue
            messages = [*asked_now, {"role": "assistant", "content": _show(console, request)}]
    if console.json:
        console.emit({"messages": messages})
    return ExitStatus.FAILURE if failed else ExitStatus.OK


def _questions(console: Console) -> Iterator[str]:
    """Lines that aren't empty."""
    while True:
        if sys.stdin.isatty():
            console.note("you:")
        # What is no UTF-8 becomes what no text has, and is refused with its question.
        line = sys.stdin.buffer.readline().decode(errors="surrogateescape")
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _show(console: Console, request: Request) -> str:
    """Prints an answer as it comes; gives it, or what there is of it where it is interrupted."""
    pieces: list[str] = []
    try:
        for token in request:
            pieces.append(token.text)
            if not console.json:
                console.write(token.text)
    except KeyboardInterrupt:
        request.cancel()
    if not console.json:
        console.write("\n")
    return "".join(pieces)
