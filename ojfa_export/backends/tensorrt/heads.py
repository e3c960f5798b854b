"""Hidden states to logits on the device: by kernels for a few rows, else by an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from ojfa_export.backends.tensorrt.arrays import DeviceArray
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS, LinearKernels, Norm

if TYPE_CHECKING:
    from ojfa_export.backends.tensorrt.engines import TensorRtEngines

# What the folded exit head consists of; another exit head runs in its engine.
FOLDED = {"project", "project.bias", "vocabulary", "vocabulary.bias"}


class Head(Protocol):
    """The model's own head, or the exit head."""

    def run(self, hidden: DeviceArray) -> DeviceArray:
        """Logits [rows, V] fp32 on the device, of hidden states [rows, H]."""
        ...


def _run_engine(engines: TensorRtEngines, name: str, hidden: DeviceArray) -> DeviceArray:
    rows, width = hidden.shape
    logits = engines.arrays.empty((rows, engines.spec.vocab_size), np.float32)
    # Addresses must be multiples of 256; a row of hidden states may lie anywhere.
    aligned = hidden if hidden.pointer % 256 == 0 else hidden.copy()
    engines.engine(name, name).run(
        rows,
        {"hidden": (aligned.pointer, width), "logits": (logits.pointer, 0)},
        {key: array.pointer for key, array in engines.weights(name).items()},
    )
    return logits


class FinalHead:
    """Final norm and LM head.

    Args:
        engines: The opened model.
    """

    def __init__(self, engines: TensorRtEngines) -> None:
        self._engines = engines
        weights = engines.weights("final_head")
        self._norm = Norm(
            weights["final_norm.weight"],
            weights.get("final_norm.bias"),
            engines.spec.norm_epsilon,
        )
        self._matrix = weights["head"]
        self._linear = engines.linear(engines.precision)

    def run(self, hidden: DeviceArray) -> DeviceArray:
        """See `Head`."""
        engines = self._engines
        if len(hidden) > MOST_TOKENS or not engines.decode_kernels:
            return _run_engine(engines, "final_head", hidden)
        logits = engines.arrays.empty((len(hidden), engines.spec.vocab_size), np.float32)
        self._linear.norm_linear(logits, hidden, self._norm, self._matrix, None)
        return logits


class ExitHead:
    """The shortcut, folded with final norm and LM head: z = h P + b; logits = z / rms(z) V^T.

    Args:
        engines: The opened model.
    """

    def __init__(self, engines: TensorRtEngines) -> None:
        self._engines = engines
        weights = engines.plan("exit_head").weights
        self._kernels: tuple[LinearKernels, LinearKernels] | None = None
        if not engines.decode_kernels or not set(weights) <= FOLDED:
            return
        project, vocabulary = weights["project"], weights["vocabulary"]
        # Copies with whole 16-byte rows: two or three megabytes for a model of 7B.
        self._project = engines.store.padded(project, turned=True)
        self._vocabulary = engines.store.padded(vocabulary, turned=False)
        self._width = project.shape[1]
        small = engines.weights("exit_head")
        self._project_bias = small["project.bias"]
        self._bias = small.get("vocabulary.bias")
        self._norm = Norm(None, None, engines.spec.norm_epsilon)
        self._kernels = (
            engines.linear(project.precision),
            engines.linear(vocabulary.precision),
        )

    def run(self, hidden: DeviceArray) -> DeviceArray:
        """See `Head`."""
        engines, rows = self._engines, len(hidden)
        if self._kernels is None or rows > MOST_TOKENS:
            return _run_engine(engines, "exit_head", hidden)
        z = engines.arrays.empty((rows, self._width), np.float32)
        logits = engines.arrays.empty((rows, engines.spec.vocab_size), np.float32)
        first, second = self._kernels
        first.linear(z, None, hidden, self._project, self._project_bias)
        second.norm_linear(logits, z, self._norm, self._vocabulary, self._bias)
        return logits
