"""Hidden states to logits and tokens on the device: by kernels for few rows, else by an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.choosing import Chooser
from ojfa_export.backends.cuda.kernels import (
    Argument,
    Kernels,
    integer,
    number,
    pointer,
)
from ojfa_export.backends.cuda.mailbox import HeadArguments
from ojfa_export.backends.tensorrt.after import cap_logits
from ojfa_export.backends.tensorrt.gemm import GemmProducts
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS, LinearKernels, Norm
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.backends.tensorrt.workspace import Workspace

# Rows of logits that are on the device at once.
HEAD_ROWS = 64
# As in exit_check.cu and choose.cu.
CHECK_THREADS, BESIDE_THREADS, CHECK_RANK, KEEP_THREADS = 512, 128, 128, 256
NOTHING_TO_KEEP = (pointer(None), pointer(None), pointer(None), integer(0))
# What the folded exit head consists of; another exit head runs in its engine.
FOLDED = {"project", "project.bias", "vocabulary", "vocabulary.bias"}
# And the model's own.
FINAL = {"final_norm.weight", "final_norm.bias", "head"}


class Head(Protocol):
    """The model's own head, the exit head, or the check head."""

    @property
    def is_small(self) -> bool:
        """Whether a check of a few rows takes so little that the next block runs beside it."""
        ...

    @property
    def chooser(self) -> Chooser:
        """Chooses among the tokens that its logits are of."""
        ...

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """Writes logits [rows, V] fp32 of hidden states [rows, H]."""
        ...

    def choose(
        self,
        hidden: DeviceArray,
        logits: DeviceArray,
        asked: HeadArguments,
        keeping: Keeping | None = None,
    ) -> None:
        """Gives an answer for hidden states [rows, H]; logits [rows, V] is room to work in.

        Hidden states that are also to be kept are copied along the way.
        """
        ...


@dataclass(slots=True)
class Keeping:
    """Hidden states of a step that are kept for later.

    Attributes:
        kernels: The compiled kernels.
        kept: Where, [sequences, positions, H].
        hidden: Of one token of some sequences, [rows, 1, H].
        workspace: Says which sequences, and at which positions.
    """

    kernels: Kernels
    kept: DeviceArray
    hidden: DeviceArray
    workspace: Workspace

    def keeps(self, states: DeviceArray) -> bool:
        """Whether these are the hidden states."""
        hidden = self.hidden
        return states.pointer == hidden.pointer and states.shape[0] == hidden.shape[0]

    def arguments(self) -> tuple[Argument, ...]:
        """Where they go, for a kernel."""
        return (
            pointer(self.kept.pointer),
            *self.workspace.places(),
            integer(self.kept.shape[1]),
        )

    def run(self) -> None:
        """Copies them."""
        kept, positions, sequences, capacity = self.arguments()
        self.kernels.launch(
            "keep",
            (self.workspace.tokens, 1, 1),
            (KEEP_THREADS, 1, 1),
            (
                kept,
                pointer(self.hidden.pointer),
                positions,
                sequences,
                capacity,
                integer(self.hidden.shape[-1]),
            ),
            overlapping=True,
        )


class ByLogits:
    """A head that chooses by way of its logits.

    Attributes:
        chooser: Chooses among the tokens that these are of.
    """

    chooser: Chooser
    is_small = False

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`."""
        raise NotImplementedError

    def choose(
        self,
        hidden: DeviceArray,
        logits: DeviceArray,
        asked: HeadArguments,
        keeping: Keeping | None = None,
    ) -> None:
        """See `Head`."""
        if keeping is not None:
            keeping.run()
        self.run(hidden, logits)
        self.chooser.choose(logits, asked)


def _run_engine(
    model: OpenedModel,
    name: str,
    weights: Mapping[str, DeviceArray],
    hidden: DeviceArray,
    logits: DeviceArray,
) -> None:
    rows, width = hidden.shape
    # Addresses must be multiples of 256; a row of hidden states may lie anywhere.
    aligned = hidden if hidden.pointer % 256 == 0 else hidden.copy()
    model.engine(name, name).run(
        rows,
        {"hidden": (aligned.pointer, width), "logits": (logits.pointer, 0)},
        {key: array.pointer for key, array in weights.items()},
    )


class FinalHead(ByLogits):
    """Final norm and LM head, or some of its rows.

    Args:
        model: The opened model.
        graph: Whose weights these are.
    """

    def __init__(self, model: OpenedModel, graph: str = "final_head") -> None:
        self._model, self._graph = model, graph
        self._weights = {
            name: array for name, array in model.weights(graph).items() if name in FINAL
        }
        self._norm = Norm(
            self._weights["final_norm.weight"],
            self._weights.get("final_norm.bias"),
            model.spec.norm_epsilon,
        )
        self._matrix = self._weights["head"]
        self.chooser = model.chooser(len(self._matrix))

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`."""
        products = self._model.products(len(hidden))
        if products:
            products.norm_linear(logits, hidden, self._norm, self._matrix, None)
            cap_logits(self.chooser.kernels, logits, self._model.spec.logit_softcap)
        else:
            _run_engine(self._model, self._graph, self._weights, hidden, logits)


class ExitHead(ByLogits):
    """The shortcut, folded with final norm and LM head: z = h P + b; logits = z / rms(z) V^T.

    Args:
        model: The opened model.
        graph: Whose weights these are: of the exit head, or of a check head with some rows of V.
    """

    def __init__(self, model: OpenedModel, graph: str) -> None:
        self._model, self._graph = model, graph
        weights = model.plan(graph).weights
        self.chooser = model.chooser(weights["vocabulary"].shape[0])
        self._kernels: tuple[LinearKernels, LinearKernels] | None = None
        self._gemms: tuple[GemmProducts | None, GemmProducts | None] = (None, None)
        self.is_small = False
        if not model.decode_kernels or not set(weights) <= FOLDED:
            return
        project, vocabulary = weights["project"], weights["vocabulary"]
        # Copies with whole 16-byte rows: two or three megabytes for a model of 7B.
        self._project = model.store.padded(project, turned=True)
        self._vocabulary = model.store.padded(vocabulary, turned=False)
        self._z = model.arrays.lasting((HEAD_ROWS, project.shape[1]), np.float32)
        small = model.weights(graph)
        self._project_bias = small["project.bias"]
        self._bias = small.get("vocabulary.bias")
        self._norm = Norm(None, None, model.spec.norm_epsilon)
        self._kernels = (
            model.linear(project.precision),
            model.linear(vocabulary.precision),
        )
        self._gemms = (model.gemm(project.precision), model.gemm(vocabulary.precision))
        self._rank = project.shape[1]
        parts = (model.device.multiprocessors, MOST_TOKENS, CHECK_RANK)
        self._z_parts = model.arrays.lasting(parts, np.uint64)
        # What was in this memory before may look like words of an answer to come.
        model.device.clear(self._z_parts.pointer, self._z_parts.nbytes)
        self.is_small = (
            self._rank <= CHECK_RANK
            and project.precision == "fp32"
            and vocabulary.precision == model.precision
            and model.spec.logit_softcap is None  # its kernel caps nothing
        )

    def run(self, hidden: DeviceArray, logits: DeviceArray) -> None:
        """See `Head`; at most HEAD_ROWS rows."""
        products = self._products(len(hidden))
        if products is None:
            weights = self._model.weights(self._graph)
            _run_engine(self._model, self._graph, weights, hidden, logits)
            return
        first, second = products
        z = self._z[: len(hidden)]
        first.linear(z, None, hidden, self._project, self._project_bias)
        second.norm_linear(logits, z, self._norm, self._vocabulary, self._bias)
        cap_logits(self.chooser.kernels, logits, self._model.spec.logit_softcap)

    def _products(self, rows: int) -> tuple[Products, Products] | None:
        """What multiplies with both matrices, for so many rows; None where an engine runs."""
        if rows <= MOST_TOKENS and self._model.decode_kernels:
            return self._kernels
        first, second = self._gemms
        return None if first is None or second is None else (first, second)

    def choose(
        self,
        hidden: DeviceArray,
        logits: DeviceArray,
        asked: HeadArguments,
        keeping: Keeping | None = None,
    ) -> None:
        """See `Head`."""
        few = len(hidden) <= MOST_TOKENS and self._model.decode_kernels
        if not few or not self.is_small:
            super().choose(hidden, logits, asked, keeping)
            return
        outputs, columns = self._vocabulary.shape
        bias = self._bias
        # Where the answer decides about more, the next block runs at the same time.
        kind, threads = (
            ("exit_check", CHECK_THREADS)
            if asked.measure < 0
            else ("exit_check_beside", BESIDE_THREADS)
        )
        self.chooser.kernels.launch(
            f"{kind}_{len(hidden)}",
            (self._model.device.multiprocessors, 1, 1),
            (threads, 1, 1),
            (
                pointer(logits.pointer if asked.sampled else None),
                pointer(hidden.pointer),
                pointer(self._project.pointer),
                pointer(self._project_bias.pointer),
                pointer(self._vocabulary.pointer),
                pointer(None if bias is None else bias.pointer),
                pointer(self._z_parts.pointer),
                integer(hidden.shape[-1]),
                integer(self._rank),
                integer(columns),
                integer(outputs),
                number(self._norm.epsilon),
                *(keeping.arguments() if keeping else NOTHING_TO_KEEP),
                *self.chooser.mailbox.asked(asked),
            ),
            overlapping=True,
        )
        self.chooser.sample(logits, asked)
