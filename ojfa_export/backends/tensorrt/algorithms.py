"""How cuBLASLt makes a model's products fastest on a GPU: measured when engines are built.

What the library recommends isn't always the fastest that it knows; each choice keeps both times.
Measured once, and kept with the engines, so that every run multiplies alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.cublas import Algorithm, Cublas, Product
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.plan import Part
from ojfa_export.backends.tensorrt.tiled import matrix_shapes
from ojfa_export.models.bfloat16 import BFLOAT16, rounded
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# Numbers of tokens that are measured; others do as the next larger one does.
TOKENS = (32, 64, 128, 256, 512, 1024, 2048)
# Of a product: ways that are tried, runs of each, and bytes of matrices that take turns, so that
# none is in the second-level cache.
TRIED, RUNS, MATRIX_BYTES = 8, 12, 256 << 20


class Choice(Part):
    """The fastest way to make a product of up to so many tokens.

    Attributes:
        tokens: At most.
        outputs: Rows of the matrix.
        columns: Of the matrix.
        result: Precision of what comes out.
        algorithm: Of the library, as hexadecimal digits.
        us: Microseconds that it took.
        recommended_us: Those of what the library recommends.
    """

    tokens: PositiveInt
    outputs: PositiveInt
    columns: PositiveInt
    result: Precision
    algorithm: str
    us: float
    recommended_us: float


class Choices(Part):
    """Of all products of a model.

    Attributes:
        cublas: Version of the library that they are for.
        precision: Of the matrices.
        choices: By product.
    """

    cublas: PositiveInt
    precision: Precision
    choices: tuple[Choice, ...]


class ChosenAlgorithms:
    """Looks choices up.

    Args:
        choices: That were measured.
    """

    def __init__(self, choices: Choices) -> None:
        self._element = DTYPES[choices.precision]
        self._known = {
            (each.tokens, each.outputs, each.columns, DTYPES[each.result]): Algorithm.from_hex(
                each.algorithm
            )
            for each in choices.choices
        }

    def __call__(self, product: Product) -> Algorithm | None:
        """How to make a product; None where that was not measured."""
        fitting = (tokens for tokens in TOKENS if tokens >= product.tokens)
        tokens = next(fitting, None)
        if tokens is None or product.element != self._element:
            return None
        return self._known.get((tokens, product.outputs, product.columns, product.result))


def measure(device: Device, spec: ModelSpec, precision: Precision) -> Choices:
    """Times the ways to make every product of a model.

    Args:
        device: The GPU.
        spec: The model.
        precision: Of its matrices.

    Raises:
        BackendError: The library isn't there.
    """
    cublas = Cublas(device)
    choices: list[Choice] = []
    for outputs, columns, result in _matrices(spec, precision):
        timer = _Timer(device, cublas, outputs, columns, precision, result)
        choices += [timer.choose(tokens) for tokens in TOKENS]
    return Choices(cublas=cublas.version, precision=precision, choices=tuple(choices))


def _matrices(spec: ModelSpec, precision: Precision) -> Iterable[tuple[int, int, Precision]]:
    """Outputs, columns, and the precision of the result."""
    *blocks, head = matrix_shapes(spec)
    up = 2
    for index, (outputs, columns) in enumerate(blocks):
        yield outputs, columns, precision if index == up else "fp32"
    yield *head, "fp32"


class _Timer:
    """Times products with matrices of one shape."""

    def __init__(
        self,
        device: Device,
        cublas: Cublas,
        outputs: int,
        columns: int,
        precision: Precision,
        result: Precision,
    ) -> None:
        self._device, self._cublas = device, cublas
        self._arrays = DeviceArrays(device)
        self._element, self._result, self._kind = DTYPES[precision], DTYPES[result], result
        size = outputs * columns * self._element.itemsize
        count = min(RUNS, max(1, -(-MATRIX_BYTES // size)))
        self._matrices = [self._filled(outputs, columns) for _ in range(count)]

    def choose(self, tokens: int) -> Choice:
        """The fastest way for so many tokens."""
        outputs, columns = self._matrices[0].shape
        product = Product(tokens, outputs, columns, self._element, self._result, False)
        x = self._filled(tokens, columns)
        out = self._arrays.empty((tokens, outputs), self._result)
        ways = self._cublas.algorithms(product, TRIED)
        seconds = [self._time(out, x, way) for way in ways] if len(ways) > 1 else [0.0]
        best = int(np.argmin(seconds))
        return Choice(
            tokens=tokens,
            outputs=outputs,
            columns=columns,
            result=self._kind,
            algorithm=ways[best].hex(),
            us=round(seconds[best] * 1e6, 1),
            recommended_us=round(seconds[0] * 1e6, 1),
        )

    def _time(self, out: DeviceArray, x: DeviceArray, way: Algorithm) -> float:
        """Seconds of a product: the best of three rounds."""

        def work() -> None:
            for run in range(RUNS):
                matrix = self._matrices[run % len(self._matrices)]
                self._cublas.multiply(out, x, matrix, algorithm=way)

        work()  # loads what it needs
        graph, best = self._device.capture(work), float("inf")
        for _ in range(3):
            self._device.synchronize()
            start = time.perf_counter()
            graph.launch()
            self._device.synchronize()
            best = min(best, time.perf_counter() - start)
        return best / RUNS

    def _stored(self, numbers: NDArray[np.float32]) -> NDArray[Any]:
        return rounded(numbers) if self._element == BFLOAT16 else numbers.astype(self._element)

    def _filled(self, rows: int, columns: int) -> DeviceArray:
        """An array of random numbers, as a GPU is slower with them than with zeros."""
        numbers = np.random.default_rng(rows).standard_normal((min(rows, 512), columns), np.float32)
        some = self._stored(numbers / np.sqrt(columns))
        result = self._arrays.lasting((rows, columns), self._element)
        for at in range(0, rows, len(some)):
            part = some[: min(len(some), rows - at)]
            self._device.upload(np.ascontiguousarray(part), result[at : at + len(part)].pointer)
        return result
