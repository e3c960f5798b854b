"""Where a command writes: results to standard output, all else to standard error."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

from ojfa_export.cli.readable import safe_for
from ojfa_export.system.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.table import Table

# Wide enough that no line of a table is broken where no terminal sets a limit.
_UNLIMITED_WIDTH = 10_000


@dataclass
class Console:
    """How this run of the program speaks.

    Attributes:
        json: Whether standard output is for one JSON document.
        debug: Whether errors come with their tracebacks.
        verbosity: -1 quiet, 0 normal, 1 verbose.
        stdout: Standard output.
        emitted: Whether the JSON document is written.
    """

    json: bool = False
    debug: bool = False
    verbosity: int = 0
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    emitted: bool = False

    @contextlib.contextmanager
    def reserved_stdout(self) -> Iterator[None]:
        """Sends what libraries print to standard error, so that results stay clean."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    def progress(self) -> Progress:
        """A bar on a terminal, lines elsewhere, nothing when quiet."""
        if self.verbosity < 0:
            return Silent()
        from ojfa_export.cli.progress import Bars, Lines

        return Bars() if sys.stderr.isatty() else Lines(sys.stderr)

    def emit(self, document: Mapping[str, Any]) -> None:
        """Writes the JSON document; numbers that JSON lacks (NaN, infinity) become null."""
        text = json.dumps(_finite(document), indent=2, allow_nan=False)
        self.emitted = True
        self.stdout.write(text + "\n")

    def write(self, text: str) -> None:
        """Writes part of a result at once."""
        self.stdout.write(safe_for(self.stdout, text))
        self.stdout.flush()

    def repeat(self, text: str) -> None:
        """Writes at once what the user gave, before what comes of it; dim on a terminal."""
        if self.stdout.isatty():
            self.stdout.write(click.style(safe_for(self.stdout, text), dim=True))
            self.stdout.flush()
        else:
            self.write(text)

    def print(self, text: str = "") -> None:
        """Writes a line of the result."""
        self.stdout.write(safe_for(self.stdout, text) + "\n")

    def heading(self, text: str) -> None:
        """Writes a heading, set off on a terminal."""
        self._render(safe_for(self.stdout, text), "bold")

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Writes a table; columns whose every cell begins with a digit are aligned right."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, heading in enumerate(headings):
            numeric = bool(rows) and all(row[index][:1].isdigit() for row in rows)
            table.add_column(safe_for(self.stdout, heading), justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(safe_for(self.stdout, cell) for cell in row))
        self._render(table)

    def facts(self, facts: Mapping[str, object]) -> None:
        """Writes names and values, one pair a line, without empty ones, lists and mappings."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(style="dim", no_wrap=True)
        for name, value in facts.items():
            if value not in (None, "") and not isinstance(value, list | tuple | dict):
                pair = (name.replace("_", " "), str(value))
                table.add_row(*(safe_for(self.stdout, cell) for cell in pair))
        self._render(table)

    def note(self, text: str) -> None:
        """Writes a remark to standard error, unless quiet."""
        if self.verbosity >= 0:
            print(safe_for(sys.stderr, text), file=sys.stderr)

    def complain(self, text: str, label: str = "") -> None:
        """Writes to standard error what even the quiet must know, after a label."""
        if label and sys.stderr.isatty():
            label = click.style(label, fg="red" if label == "error:" else None, bold=True)
        said = safe_for(sys.stderr, text)
        print(f"{label} {said}" if label else said, file=sys.stderr, flush=True)

    def _render(self, content: str | Table, style: str | None = None) -> None:
        from rich.console import Console as RichConsole

        rich = RichConsole(
            file=self.stdout,
            width=None if self.stdout.isatty() else _UNLIMITED_WIDTH,
            markup=False,
            highlight=False,
            emoji=False,
        )
        with rich.capture() as captured:
            rich.print(content, style=style)
        # rich fills a table's last column with blanks.
        for line in captured.get().splitlines():
            self.stdout.write(line.rstrip() + "\n")


def describe_hardware(machine: Mapping[str, Any]) -> dict[str, str]:
    """What was measured on, of `planning.machine.describe_machine`, as facts."""
    about = f"{machine['cpu']}, {machine['cores']} cores"
    if "device" in machine:
        return {**machine["device"], "CPU": about}
    return {"CPU": f"{about}, {machine['threads']} threads"}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
