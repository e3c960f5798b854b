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

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """Writes logits [rows, V] fp32 of hidden states [rows, H]."""
        ...


def _run_engine(
    engines: TensorRtEngines, name: str, hidden: DeviceArray, logits: DeviceArray
) -> None:
    rows, width = hidden.shape
    # Addresses must be multiples of 256; a row of hidden states may lie anywhere.
    aligned = hidden if hidden.pointer % 256 == 0 else hidden.copy()
    engines.engine(name, name).run(
        rows,
        {"hidden": (aligned.pointer, width), "logits": (logits.pointer, 0)},
        {key: array.pointer for key, array in engines.weights(name).items()},
    )


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

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`."""
        engines = self._engines
        if len(hidden) > MOST_TOKENS or not engines.decode_kernels:
            _run_engine(engines, "final_head", hidden, logits)
        else:
            self._linear.norm_linear(logits, hidden, self._norm, self._matrix, None)


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
        self._z = engines.arrays.lasting((MOST_TOKENS, project.shape[1]), np.float32)
        small = engines.weights("exit_head")
        self._project_bias = small["project.bias"]
        self._bias = small.get("vocabulary.bias")
        self._norm = Norm(None, None, engines.spec.norm_epsilon)
        self._kernels = (
            engines.linear(project.precision),
            engines.linear(vocabulary.precision),
        )

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`."""
        rows = len(hidden)
        if self._kernels is None or rows > MOST_TOKENS or not self._engines.decode_kernels:
            _run_engine(self._engines, "exit_head", hidden, logits)
            return
        first, second = self._kernels
        z = self._z[:rows]
        first.linear(z, None, hidden, self._project, self._project_bias)
        second.norm_linear(logits, z, self._norm, self._vocabulary, self._bias)
