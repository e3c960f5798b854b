"""An opened model on the GPU: weights, engines and kernels, loaded when first used."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArrays
from ojfa_export.backends.cuda.choosing import Chooser
from ojfa_export.backends.cuda.cublas import Cublas
from ojfa_export.backends.cuda.device import Device
from ojfa_export.backends.cuda.failures import NO_CUBLAS
from ojfa_export.backends.cuda.kernels import Kernels
from ojfa_export.backends.cuda.mailbox import Mailbox
from ojfa_export.backends.cuda.sources import SMALL_WIDTH
from ojfa_export.backends.tensorrt.algorithms import Choices, ChosenAlgorithms
from ojfa_export.backends.tensorrt.engine import Engine, EngineSet
from ojfa_export.backends.tensorrt.gemm import GemmProducts
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS, LinearKernels
from ojfa_export.backends.tensorrt.memory import Request, Room
from ojfa_export.backends.tensorrt.narrow import on_tensor_cores
from ojfa_export.backends.tensorrt.plan import (
    PASS_TOKENS,
    PREFILL_TOKENS,
    GraphPlan,
    has_engines,
    read_plan,
)
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.backends.tensorrt.quantised import (
    MOST_QUANTISED_TOKENS,
    ByMatrix,
    DequantisedProducts,
    QuantisedKernels,
)
from ojfa_export.backends.tensorrt.quantised_room import QuantisedShape
from ojfa_export.backends.tensorrt.tiled import matrix_shapes, most_tokens
from ojfa_export.backends.tensorrt.weights import WeightStore
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.decoding.arrays import Float32
from ojfa_export.errors import BackendError, BundleError, UsageError
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

DECODE_VARIABLE = "OJFA_DECODE"


class OpenedModel:
    """Weights, engines and kernels that passes and heads need.

    Args:
        device: The GPU.
        spec: The model.
        weights: Directory of the weight files.
        engines: Plans by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.
        beside: Another opened model that this one shares weights, answers' places and cuBLASLt
            with: a draft layer's model.

    Attributes:
        decode_kernels: Whether steps of a few tokens run in CUDA kernels of ours rather than in
            TensorRT's engines (OJFA_DECODE=engines).
        most_linear_tokens: Of a step that runs in matrix-vector kernels: none in a small model of
            fp16 or bf16, if tensor cores find room for it.
        form: What quantised matrices are stored as; None where none is.
        cache_dtype: Of keys and values; uint8 for the bits of fp8.
        has_engines: Whether there are engines of TensorRT.
        pass_tokens: Of a pass that our kernels and cuBLASLt run at once; more run in pieces.
    """

    pass_tokens = PASS_TOKENS

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
        beside: OpenedModel | None = None,
    ) -> None:
        device.make_current()
        self.device, self.spec = device, spec
        self.arrays = DeviceArrays(device)
        self.decode_kernels = _decode_kernels()
        self._files = files
        self._directory = next(iter(engines.values())).parent
        self._plans = {name: read_plan(path, files) for name, path in engines.items()}
        embed = self._plans["embed"]
        self.precision: Precision = embed.precision
        self.form = embed.form
        self.cache_dtype = np.dtype(np.uint8 if embed.cache == "fp8" else DTYPES[self.precision])
        self.has_engines = has_engines(self.precision, self.form)
        self.kernels: dict[Precision, Kernels] = {
            kind: Kernels(device, files.read(self._directory / file))
            for kind, file in embed.kernels.items()
        }
        self.store: WeightStore = (
            beside.store if beside else WeightStore(device, weights, self.kernels, files)
        )
        self._room = Room(
            spec, DTYPES[self.precision].itemsize, self.cache_dtype.itemsize, self._plans
        )
        self.rotary = tuple(map(self.arrays.upload, rotary)) if rotary else None
        self.rotary_rows = len(rotary[0]) if rotary else 0
        self._engines: EngineSet | None = None
        self._weights: dict[str, dict[str, Any]] = {}
        self.mailbox: Mailbox = beside.mailbox if beside else Mailbox(device)
        chosen = self.kernels[self.precision]
        self.most_linear_tokens = MOST_TOKENS
        if self.precision != "fp32" and spec.hidden_size <= SMALL_WIDTH:
            self.most_linear_tokens = 0
        self._tiled, self._most_tiled = None, 0
        if self.precision != "fp32":
            dtype = DTYPES[self.precision]
            self._tiled = on_tensor_cores(device, self.arrays, chosen, dtype, spec.hidden_size)
            room = device.multiprocessors, device.shared_bytes
            self._most_tiled = most_tokens(matrix_shapes(spec), *room)
        self._cublas: Cublas | None = beside._cublas if beside else _cublas(device)
        if not self.has_engines:
            self._check_no_engine_is_needed()
        if self._cublas is not None and embed.products is not None:
            self._choose_algorithms(self._cublas, self._directory / embed.products)
        self._gemm = self.gemm(self.precision)
        self._quantised: tuple[QuantisedKernels, DequantisedProducts] | None = None
        if self.form is not None:
            self._quantised = self._with_quantised(self.form, chosen)

    def chooser(self, tokens: int) -> Chooser:
        """Chooses among so many tokens."""
        return Chooser(self.kernels[self.precision], self.mailbox, tokens)

    def plan(self, name: str) -> GraphPlan:
        """A graph's plan."""
        return self._plans[name]

    def weights(self, name: str) -> dict[str, Any]:
        """A graph's weights, uploaded on first use: arrays, or `DeviceMatrix` where quantised."""
        if name not in self._weights:
            self._weights[name] = self.store.load(self._plans[name])
        return self._weights[name]

    def engine(self, name: str, part: str) -> Engine:
        """An engine; equal blocks share theirs. All are opened when one is first used."""
        if self._engines is None:
            files = {file for plan in self._plans.values() for file in plan.engines.values()}
            paths = [self._directory / file for file in files]
            self._engines = EngineSet(self.device, paths, self._files)
        return self._engines[self._plans[name].engines[part]]

    def products(self, tokens: int) -> Products | None:
        """The kernels that run so many tokens of a step; None where TensorRT's engines do."""
        plain = self._plain_products(tokens)
        if plain is None or self._quantised is None:
            return plain
        few, many = self._quantised
        return ByMatrix(plain, few if tokens <= MOST_QUANTISED_TOKENS else many)

    def _plain_products(self, tokens: int) -> Products | None:
        """Those with matrices of elements."""
        if not self.decode_kernels:
            return None
        if tokens <= self.most_linear_tokens:
            return self.linear(self.precision)
        if tokens <= self._most_tiled:
            return self._tiled
        return self.linear(self.precision) if tokens <= MOST_TOKENS else self._gemm

    def linear(self, precision: Precision) -> LinearKernels:
        """The matrix-vector kernels for matrices of a precision."""
        return LinearKernels(self.device, self.kernels[precision], DTYPES[precision].itemsize)

    def _with_quantised(
        self, form: WeightFormat, kernels: Kernels
    ) -> tuple[QuantisedKernels, DequantisedProducts]:
        """What multiplies with quantised matrices: of few tokens, and of many."""
        assert self._gemm is not None
        dtype, made = DTYPES[self.precision], (self.device, self.arrays, kernels)
        shapes = {
            QuantisedShape(*each.shape(form), each.paired)
            for plan in self._plans.values()
            for each in plan.quantised.values()
        }
        largest = max((each.outputs * each.columns for each in shapes), default=0)
        return (
            QuantisedKernels(*made, form, dtype, shapes, self.spec.hidden_size),
            DequantisedProducts(*made, self._gemm, dtype, largest),
        )

    def _check_no_engine_is_needed(self) -> None:
        """Refuses what TensorRT's engines would run, where there are none."""
        what = self.precision if self.form is None else self.form.storage
        if not self.decode_kernels:
            raise BackendError(
                f"a model in {what} has no engines of TensorRT, and {DECODE_VARIABLE}=engines is "
                "set",
                hint=f"unset {DECODE_VARIABLE}, or build with --precision fp16, without --weights",
            )
        if self._cublas is None:
            raise BackendError(
                f"passes of many tokens need cuBLASLt in {what}, which was not found",
                hint=NO_CUBLAS,
            )

    def _choose_algorithms(self, cublas: Cublas, path: Path) -> None:
        """Takes the measured ways to make products, if they are of this version of the library."""
        try:
            choices = Choices.model_validate_json(self._files.read(path))
            chosen = ChosenAlgorithms(choices)
        except ValueError as error:
            raise BundleError(
                f"{path} can't be read: {str(error).splitlines()[0]}",
                hint="rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt'",
            ) from error
        if choices.cublas == cublas.version:
            cublas.choose = chosen

    def gemm(self, precision: Precision) -> GemmProducts | None:
        """Products of many tokens with matrices of a precision; None without cuBLASLt."""
        if self._cublas is None:
            return None
        dtype = DTYPES[precision]
        kernels, tokens = self.kernels[precision], self.pass_tokens
        return GemmProducts(self._cublas, self.arrays, kernels, dtype, tokens)

    def most_pass_tokens(self) -> int:
        """Tokens of a pass that run at once; more run in pieces."""
        return self.pass_tokens if self.products(PREFILL_TOKENS[-1]) else PREFILL_TOKENS[-1]

    def close(self, name: str) -> None:
        """Lets go of a graph's weights."""
        self.device.recorder.clear()
        self._weights.pop(name, None)
        self.store.forget(self._plans[name])

    def check_room(self, request: Request, cached: Collection[int] = ()) -> None:
        """Refuses what won't fit, before any of it takes memory: see `memory.Room.check`."""
        self._room.check(
            request,
            self.device.available(),
            self.device.name,
            self.store.held,
            cached,
            opened=self._engines is not None,
        )


def _cublas(device: Device) -> Cublas | None:
    """The library, where it is: without it TensorRT's engines run passes of many tokens."""
    try:
        return Cublas(device)
    except BackendError:
        return None


def _decode_kernels() -> bool:
    value = os.environ.get(DECODE_VARIABLE, "") or "kernels"
    if value not in ("kernels", "engines"):
        raise UsageError(f"{DECODE_VARIABLE} must be 'kernels' or 'engines', not '{value}'")
    return value == "kernels"
