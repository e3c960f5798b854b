"""How many threads an operator is split over."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ojfa_export.errors import UsageError

THREADS_VARIABLE = "OJFA_THREADS"
# More than so many threads for each core only wait for each other.
MOST_PER_CORE = 4
# Percent of the time in which some task waits for a core; from there on the machine is busy.
BUSY_PRESSURE = 20.0


def default_threads() -> int:
    """OJFA_THREADS, or the cores that this process may use and that others leave idle.

    The threads of an operator meet at its end, and there are hundreds of operators in a token's
    step: one thread that the system has taken off its core for a moment holds up all others. On a
    busy machine fewer threads are therefore faster, and one is fastest (bench/NOTES.md).

    Raises:
        UsageError: OJFA_THREADS is no number of threads that could help.
    """
    cores = len(os.sched_getaffinity(0))
    value = os.environ.get(THREADS_VARIABLE, "")
    if not value:
        return max(1, cores - busy_cores())
    most = MOST_PER_CORE * max(cores, os.cpu_count() or 1)
    is_number = value.isascii() and value.isdecimal() and len(value) < 10
    if not (is_number and 1 <= int(value) <= most):
        raise UsageError(
            f"{THREADS_VARIABLE} must be a whole number from 1 to {most} on this machine, not "
            f"'{value:.40}'",
            hint=f"for example {THREADS_VARIABLE}={cores}; one for each core is most that helps",
        )
    return int(value)


def busy_cores(proc: Path = Path("/proc")) -> int:
    """Cores that other tasks want at this moment; 0 where none has to wait, or nobody knows.

    Args:
        proc: Where the system tells of itself.
    """
    with suppress(OSError, ValueError, IndexError):
        some = (proc / "pressure" / "cpu").read_text().splitlines()[0]
        fields = dict(each.split("=") for each in some.split()[1:])
        if float(fields["avg10"]) < BUSY_PRESSURE:
            return 0
        running = (proc / "loadavg").read_text().split()[3].split("/")[0]
        return max(0, int(running) - 1)  # without the task that asks
    return 0
