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
from ojfa_export.errors import UsageError

if TYPE_CHECKING:
    from ojfa_export.engine.request import Request


@define("chat")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="What the system message says.")
@generation_options
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to run.")
def command(
    console: Console, bundle: Path, system: str | None, backend: str, **arguments: Any
) -> None:
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
        for question in _questions(console):
            messages.append({"role": "user", "content": question})
            request = engine.submit(model.chats.encode(messages), options)
            messages.append({"role": "assistant", "content": _show(console, request)})
    if console.json:
        console.emit({"messages": messages})


def _questions(console: Console) -> Iterator[str]:
    """Lines that aren't empty."""
    while True:
        if sys.stdin.isatty():
            console.note("you:")
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise UsageError("a question is not text in UTF-8", hint="convert it first") from None
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
