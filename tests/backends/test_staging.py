"""Small uploads, which don't wait for the stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def device(driver: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose ring of host memory goes round soon."""
    from ojfa_export.backends.cuda import device

    monkeypatch.setattr(device, "SEGMENT_BYTES", 256)
    return device.Device()


def test_uploads_arrive_whatever_becomes_of_the_host_memory(
    driver: Any, device: Any, rng: np.random.Generator
) -> None:
    from ojfa_export.backends.cuda.arrays import DeviceArrays

    arrays = DeviceArrays(device)
    targets, expected = [], []
    for _ in range(200):
        numbers = rng.integers(0, 1 << 30, int(rng.integers(1, 100)), dtype=np.int32)
        targets.append(arrays.empty(numbers.shape, np.int32))
        expected.append(numbers.copy())
        device.upload(numbers, targets[-1].pointer)
        numbers[:] = -1
        if rng.random() < 0.1:
            driver.progress(int(rng.integers(5)))
    for target, numbers in zip(targets, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(target), numbers)


def test_an_upload_leaves_the_stream_alone(driver: Any, device: Any) -> None:
    from ojfa_export.backends.cuda.arrays import DeviceArrays

    target = DeviceArrays(device).empty((8,), np.int32)
    driver.progress()
    for _ in range(20):  # as many as find room: two of 128 bytes in a segment
        before = len(driver.stream)
        device.upload(np.zeros(8, np.int32), target.pointer)
        assert len(driver.stream) == before + 1
