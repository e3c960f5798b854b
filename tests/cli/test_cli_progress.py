"""Progress: lines in logs, bars on terminals, nothing when quiet."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from ojfa_export.cli.console import Console
from ojfa_export.cli.progress import Lines
from ojfa_export.cli.readable import readable_bytes, readable_seconds
from ojfa_export.system.progress import Silent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _lines(steps: list[tuple[float, int]], total: int) -> list[str]:
    """Lines of a task that advances so many units after so many seconds, step by step."""
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).task("export blocks", total, "blocks") as task:
        for seconds, count in steps:
            clock.now += seconds
            task.advance(count)
    return stream.getvalue().splitlines()


def test_lines_say_done_elapsed_and_left() -> None:
    assert _lines([(4.1, 3), (12.3, 9)], 12) == [
        "export blocks: 3/12 blocks, 4.1 s elapsed, about 12 s left",
        "export blocks: 12/12 blocks, 16 s",
    ]


def test_tokens_have_a_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    with Lines(stream, clock).task("training", 40_000, "tokens") as task:
        for _ in range(2):
            clock.now += 4
            task.advance(20_000)
    assert stream.getvalue().splitlines() == [
        "training: 20000/40000 tokens, 4.0 s elapsed, 5,000 tokens/s, about 4.0 s left",
        "training: 40000/40000 tokens, 8.0 s",
    ]


def test_lines_are_two_seconds_apart() -> None:
    lines = _lines([(0.5, 1)] * 20, 20)
    assert [line.split()[2] for line in lines] == ["4/20", "8/20", "12/20", "16/20", "20/20"]


def test_short_task_has_one_line() -> None:
    assert _lines([(0.01, 1)] * 7, 7) == ["export blocks: 7/7 blocks, 0.1 s"]


def test_task_of_no_units_has_one_line() -> None:
    assert _lines([], 0) == ["export blocks: 0/0 blocks, 0.0 s"]


def test_failed_task_does_not_claim_to_have_ended() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Lines(stream).task("export", 3, "blocks") as task:
            task.advance()
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert stream.getvalue() == ""


def test_quiet_is_silent() -> None:
    assert isinstance(Console(verbosity=-1).progress(), Silent)


def test_terminal_gets_bars() -> None:
    program = (
        "from ojfa_export.cli.console import Console\n"
        "progress = Console().progress()\n"
        "for _ in range(2):\n"
        "    with progress.task('outer [x]', 2, 'blocks') as outer:\n"
        "        outer.advance()\n"
        "        with progress.task('inner', 5, 'files') as inner:\n"
        "            inner.advance(5)\n"
        "            print('result')\n"
        "        outer.advance()\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        shown = _read_all(master)
        assert process.stdout is not None
        assert process.stdout.read() == b"result\nresult\n"
    assert process.returncode == 0, shown
    assert "outer [x]" in shown
    assert "2 of 2 blocks" in shown
    assert "elapsed" in shown
    assert shown.count("\x1b[?25h") >= 2  # the cursor is back after each


def _read_all(descriptor: int) -> str:
    parts = []
    try:
        while part := os.read(descriptor, 4096):
            parts.append(part)
    except OSError:  # Linux's way to say that the other end is closed
        pass
    finally:
        os.close(descriptor)
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
     (200, "3 min 20 s"), (3599.7, "1 h 0 min"), (3900, "1 h 5 min")],
)  # fmt: skip
def test_readable_seconds(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (81_330_000, "81.3 MB"), (3e12, "3000.00 GB")],
)
def test_readable_bytes(count: float, text: str) -> None:
    assert readable_bytes(count) == text
