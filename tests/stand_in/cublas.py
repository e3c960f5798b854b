"""The class `Cublas` with its products in NumPy, done when the stream gets to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from stand_in.kernels import view
from stand_in.late_driver import StandInDriver


def make_cublas(driver: StandInDriver) -> type:
    """A class that takes the place of `backends.cuda.cublas.Cublas`."""

    class Cublas:
        version = 130000

        def __init__(self, device: Any) -> None:
            self._device = device

        def algorithms(self, product: Any, most: int) -> list[Any]:
            from ojfa_export.backends.cuda.cublas import Algorithm

            return [Algorithm()]

        def multiply(
            self,
            out: Any,
            x: Any,
            matrix: Any,
            bias: Any = None,
            added: Any = None,
            algorithm: Any = None,
        ) -> None:
            assert x.dtype == matrix.dtype
            assert x.shape[1] == matrix.shape[1]
            assert out.shape == (x.shape[0], matrix.shape[0])

            def work() -> None:
                left, right = (
                    view(each.pointer, each.dtype, *each.shape).astype(np.float32)
                    for each in (x, matrix)
                )
                with np.errstate(invalid="ignore"):  # rows that only fill a pass up are anything
                    y = left @ right.T
                if bias is not None:
                    assert bias.dtype == out.dtype
                    y = y + view(bias.pointer, bias.dtype, *bias.shape)
                with np.errstate(over="ignore", invalid="ignore"):  # as on a GPU
                    if added is not None:
                        y = y + view(added.pointer, added.dtype, *added.shape)
                    view(out.pointer, out.dtype, *out.shape)[...] = y

            driver.launched.append("multiply")
            driver.put(work, self._device.stream)

    return Cublas
