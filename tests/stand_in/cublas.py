"""The class `Cublas` with its products in NumPy, done when the stream gets to them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from stand_in.kernels import view
from stand_in.late_driver import StandInDriver


def numbers(array: Any) -> np.ndarray:
    """An array's memory; bf16 is uint16 to the backend."""
    kind = ml_dtypes.bfloat16 if array.dtype == np.uint16 else array.dtype
    return view(array.pointer, kind, *array.shape)


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
                left, right = (numbers(each).astype(np.float32) for each in (x, matrix))
                with np.errstate(invalid="ignore"):  # rows that only fill a pass up are anything
                    y = left @ right.T
                if bias is not None:
                    assert bias.dtype == out.dtype
                    y = y + numbers(bias)
                with np.errstate(over="ignore", invalid="ignore"):  # as on a GPU
                    if added is not None:
                        y = y + numbers(added)
                    numbers(out)[...] = y

            driver.launched.append("multiply")
            driver.put(work, self._device.stream)

    return Cublas
