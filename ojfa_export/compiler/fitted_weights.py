"""Fitting quantised weights to the text that calibration runs: block after block, head last.

Each block's matrices are quantised by what goes into them in the quantised model: the block is run
on text with those before it quantised already, and within it each matrix by what the quantised ones
before give (`graphs.gptq`). One block is in memory, in float64 arithmetic (`verify.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.weight_format import BLOCK_MATRICES, QuantisedMatrix
from ojfa_export.decoding.arrays import Int32
from ojfa_export.graphs.input_factor import InputFactor
from ojfa_export.graphs.quantised import Quantiser
from ojfa_export.system.heap import trim_heap
from ojfa_export.verify.exact import Dequantised, ExactModel, Float64

# Of the text: as many tokens as say enough of the inputs of a model of a few hundred features, and
# as few as keep the time of a build within that of its other stages.
WINDOWS, WINDOW_TOKENS = 18, 256
Read = Callable[[str], NDArray[Any]]


def fitting_text(windows: Int32) -> Int32:
    """Windows from all over the calibration data, [n, length]."""
    rows = np.unique(np.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).astype(int))
    return np.ascontiguousarray(windows[rows, :WINDOW_TOKENS])


class WeightFitter:
    """Quantises a model's matrices in the order in which they run; see `graphs.export.Fitter`.

    Args:
        exact: The model, of whose graphs those that were written are read.
        token_ids: Text, [B,S].
        quantiser: Makes the matrices.
    """

    def __init__(self, exact: ExactModel, token_ids: Int32, quantiser: Quantiser) -> None:
        self._exact, self._token_ids, self._quantiser = exact, token_ids, quantiser
        self._hidden: Float64 | None = None  # what goes into the next block, in one place

    def block(self, index: int, read: Read) -> dict[str, QuantisedMatrix]:
        """Quantises the matrices of the next block.

        Args:
            index: Which.
            read: Gives its tensors by name; KeyError where it has none of that name.
        """
        made: dict[str, QuantisedMatrix] = {}

        def fit(name: str, x: Float64) -> Dequantised:
            key = f"{name}.weight"
            trim_heap()  # what products before have left
            factor = factor_of(x)  # before the weights are in memory
            made[key] = self._quantiser.make(read(key), factor)
            return Dequantised(made[key], self._quantiser.form)

        self._exact.pass_on(index, _Tensors(read), self._before(), fit)
        assert set(made) == set(BLOCK_MATRICES)
        return made

    def skip(self, index: int) -> None:
        """Goes on behind a block whose graph is there already."""
        weights = self._exact.block_weights(index)
        self._exact.pass_on(
            index, weights, self._before(), lambda name, _: weights[f"{name}.weight"]
        )

    def head(self, read: Read) -> InputFactor:
        """What is known of the inputs of the head, after the last block.

        Args:
            read: Gives the final norm's tensors.
        """
        return factor_of(self._exact.final_norm(self._before(), _Tensors(read)))

    def _before(self) -> Float64:
        if self._hidden is None:
            self._hidden = self._exact.embed(self._token_ids)
        return self._hidden


def factor_of(x: Float64) -> InputFactor:
    """Of inputs [..., features]."""
    return InputFactor.of(x.reshape(-1, x.shape[-1]))


class _Tensors(Mapping[str, NDArray[Any]]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("they are known by their names alone")

    def __len__(self) -> int:
        raise NotImplementedError("they are known by their names alone")
