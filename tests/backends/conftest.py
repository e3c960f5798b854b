"""The TensorRT backend over a stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The stand-in's driver; the backend's modules are imported over it, and taken out again."""
    from stand_in import stand_in_gpu  # where ONNX Runtime is

    with stand_in_gpu() as driver, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield driver
