"""How the host reads answers that a device is writing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


class Torn:
    """An answer that is written while it is read: values are read before their numbers are."""

    def __init__(self, answer: Any, older: tuple[Any, ...], newer: tuple[Any, ...]) -> None:
        self.size, self._answer = answer.size, answer
        between = tuple(old if i % 2 == 0 else newer[i] for i, old in enumerate(older))
        self._seen = [older, between]
        self._whole = newer

    def unpack_from(self, buffer: Any, offset: int) -> tuple[Any, ...]:
        return self._seen.pop(0) if self._seen else self._whole


def test_a_value_is_never_older_than_its_number(driver: Any, monkeypatch: Any) -> None:
    from ojfa_export.backends.cuda import mailbox

    older = (3, 1, 3, 1, 0.25, 1, 0.125, 1, -2.0, 1)
    newer = (7, 9, 8, 9, 0.5, 9, 0.375, 9, -1.0, 9)
    monkeypatch.setattr(mailbox, "ANSWER", Torn(mailbox.ANSWER, older, newer))
    box = object.__new__(mailbox.Mailbox)  # without the memory of a device
    box._bytes = memoryview(b"")
    box._device = SimpleNamespace(recorder=SimpleNamespace(done=0), idle=lambda: False)
    assert box.read(slot=0, turn=9, rows=1, launch=4) == [(7, 8, 0.5, 0.375, -1.0)]
    assert box._device.recorder.done == 4


def test_an_answer_that_never_comes_is_an_error(driver: Any) -> None:
    from ojfa_export.backends.cuda import mailbox
    from ojfa_export.errors import BackendError

    box = object.__new__(mailbox.Mailbox)
    box._bytes = memoryview(bytes(mailbox.ANSWER.size))
    box._device = SimpleNamespace(recorder=SimpleNamespace(done=0), idle=lambda: True)
    with pytest.raises(BackendError, match="gave no answer"):
        box.read(slot=0, turn=9, rows=1, launch=4)
