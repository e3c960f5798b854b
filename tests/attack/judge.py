"""What counts as a fault.

Of every command: its exit status is a documented one; a failure is one `error:` line, perhaps with
a `hint:` line, without traceback, "internal error" or a library's panic; it ends within the limit
of time; no signal ends it.

Of a damaged bundle: where a command succeeds, the tokens are those of the undamaged bundle, or else
`verify` names the damage (it fails, or refuses the bundle). A bundle whose digests, golden tokens
and weights all agree is another model: cases that only make such a one say so (`another`), and are
counted apart. Cases whose damage must never pass say what must notice it (`Must`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from .child import Outcome

FAULTS = (
    "tracebacks",
    "hangs",
    "crashes",
    "untidy",
    "silently wrong",
    "bundles lost",
    "differences",
)

_TRACEBACK = re.compile(
    r"Traceback \(most recent call last\)|internal error|panicked at|PanicException"
)
# What C++ and Python say of themselves where nobody put it into words.
_RAW = re.compile(r"std::|bad_alloc|vector::|map::at|basic_string|KeyError|TypeError")
_SANITIZER = re.compile(r"Sanitizer: |runtime error: ")
# Of one request that can't be met: a sanitized program ends where std::bad_alloc would be thrown.
_NO_MEMORY = re.compile(r"Sanitizer: (allocator is out of memory|requested allocation size)")
_DOCUMENTED = {0, 1, 2, 3}


class Must(Enum):
    """What must notice a case's damage."""

    REFUSE = "the bundle is refused by every command"
    NAME = "the bundle is refused, or verify fails"
    ANY = "what succeeds gives the same tokens, or verify fails"


@dataclass(frozen=True)
class Fault:
    """One fault of one case.

    Attributes:
        kind: One of FAULTS.
    """

    kind: str
    what: str


def judge_outcome(outcome: Outcome) -> list[Fault]:
    """The faults in how a command ended, whatever it was given."""
    said = f"{outcome.command}: {_shown(outcome.stderr)}"
    if outcome.status is None:
        return [Fault("hangs", f"{outcome.command}: killed when out of time")]
    if lacks_memory(outcome):
        return []
    if _SANITIZER.search(outcome.stderr):
        return [Fault("crashes", f"{outcome.command}: {_sanitizer_line(outcome.stderr)}")]
    if outcome.status < 0:
        return [Fault("crashes", f"signal {-outcome.status}: {said}")]
    if _TRACEBACK.search(outcome.stderr):
        return [Fault("tracebacks", said)]
    if outcome.status not in _DOCUMENTED:
        return [Fault("untidy", f"exit status {outcome.status}: {said}")]
    if outcome.status in (1, 2):
        return [Fault("untidy", f"{why}: {said}") for why in _untidy(outcome)]
    return []


def lacks_memory(outcome: Outcome) -> bool:
    """Whether a sanitized program asked for more memory at once than there can be."""
    return _NO_MEMORY.search(outcome.stderr) is not None


def refused(outcome: Outcome) -> bool:
    """Whether the command ended with an error, well said or not."""
    return outcome.status not in (0, 3)


def _untidy(outcome: Outcome) -> Iterable[str]:
    lines = [line for line in outcome.stderr.split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    if len(errors) != 1:
        yield f"{len(errors)} lines begin with 'error:'"
        return
    if _RAW.search(errors[0]):
        yield "the error is a library's own words"
    usage = outcome.status == 2
    stray = [line for line in lines if not line.startswith(("error:", "hint:"))]
    if stray and not usage:
        yield f"{len(stray)} lines are neither error nor hint"


def _sanitizer_line(text: str) -> str:
    found = [line for line in text.splitlines() if _SANITIZER.search(line)]
    frames = [line.strip() for line in text.splitlines() if "/engines/" in line][:2]
    return " | ".join([found[0].strip(), *frames])


def _shown(text: str, width: int = 300) -> str:
    """The end of what was written, on one line."""
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("hint:")]
    line = " / ".join(lines[-3:])
    return line if len(line) <= width else f"{line[: width // 2]} … {line[-width // 2 :]}"
