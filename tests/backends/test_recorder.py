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
