"""Work that is put together, whoever asks for it and whenever."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any


class Garbage:
    """Can't be reached any more; flushes when it is collected, as a session's cache does."""

    def __init__(self, flush: Any) -> None:
        self.itself, self.flush = self, flush

    def __del__(self) -> None:
        self.flush()


def test_work_is_done_once_whenever_garbage_is_collected(driver: Any) -> None:
    from ojfa_export.backends.cuda.recorder import Recorder

    device = SimpleNamespace(capture=lambda work: SimpleNamespace(launch=work))
    recorder = Recorder(device)  # type: ignore[arg-type]
    done: list[int] = []
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(200):
            Garbage(recorder.flush)
            recorder.add(("piece", number % 5), lambda number=number: done.append(number))
            recorder.flush()
    finally:
        gc.set_threshold(*threshold)
    # A recording does what it did when it was made.
    assert [each % 5 for each in done] == [number % 5 for number in range(200)]


def test_the_recordings_used_longest_ago_are_forgotten(driver: Any) -> None:
    from ojfa_export.backends.cuda.recorder import Recorder

    captured: list[int] = []

    def capture(work: Any) -> Any:
        captured.append(1)
        return SimpleNamespace(launch=work)

    device = SimpleNamespace(capture=capture, synchronize=lambda: None)
    recorder = Recorder(device, most=8)  # type: ignore[arg-type]

    def run(piece: int) -> int:
        """How many recordings were made for it."""
        before = len(captured)
        recorder.add(("piece", piece), lambda: None)
        recorder.flush()
        return len(captured) - before

    for piece in range(8):
        run(piece)
        assert run(piece) == 1
    recorder.name("known", "note")
    run(0)
    newest, note = recorder.find("known") or (None, None)
    assert note == "note"
    recorder.replay(newest)  # type: ignore[arg-type]
    run(8)  # pieces 1 and 2 make room
    assert [run(piece) for piece in (0, 3, 4, 5, 6, 7)] == [0] * 6
    assert recorder.find("known") is not None
    assert [run(8), run(8)] == [1, 0]
    for piece in (9, 10, 11, 12):
        run(piece)
        run(piece)
    assert recorder.find("known") is None or run(7) == 0
    assert len(recorder._graphs) <= 8
    assert len(recorder._last_use) <= 8
