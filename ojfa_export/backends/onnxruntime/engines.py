"""Engines of ONNX Runtime's CPU provider: executors and heads of an opened model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.onnxruntime.executor import OnnxRuntimeExecutor
from ojfa_export.backends.onnxruntime.opened import OpenedModel
from ojfa_export.bundle.names import CHECK_HEAD, block_name
from ojfa_export.decoding.arrays import Float32, Int32


class OnnxRuntimeEngines(OpenedModel, ChoosesOnHost):
    """An opened model, the passes over it and its heads; see `backends.backend.Engines`."""

    def load_blocks(self, depth: int) -> None:
        """Opens the sessions of the embedding and the first blocks."""
        for name in ("embed", *map(block_name, range(depth))):
            self.session(name)

    def executor(self, slots: int, capacity: int) -> OnnxRuntimeExecutor:
        """Makes a KV cache; memory is taken as positions are written."""
        return OnnxRuntimeExecutor(self, slots, capacity)

    def logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """Applies the model's own head, or the exit head: [rows, H] to [rows, V]."""
        session = self.session(self._head_of(blocks_run))
        result: Float32 = session.run(None, head_inputs(session, hidden, blocks_run))[0]
        return result

    def logits_of_exits(self, hidden: Float32, blocks_run: Sequence[int]) -> Float32:
        """See `backends.backend.AsksExitsTogether`."""
        session = self.session(self._head_of(1))
        result: Float32 = session.run(None, head_inputs(session, hidden, blocks_run))[0]
        return result

    @property
    def has_check_head(self) -> bool:
        """See `backends.checks.ChecksExits`."""
        return CHECK_HEAD in self._engines

    def check_logits(self, hidden: Float32, blocks_run: int | Sequence[int]) -> Float32:
        """See `backends.checks.ChecksExits`."""
        session = self.session(CHECK_HEAD)
        result: Float32 = session.run(None, head_inputs(session, hidden, blocks_run))[0]
        return result

    def _head_of(self, blocks_run: int) -> str:
        """The head's graph after so many blocks; behind exits' blocks it is the model's own."""
        own = blocks_run == self.spec.blocks or self.exit_blocks is not None
        return "final_head" if own else "exit_head"

    def unload_heads(self) -> None:
        """Closes the heads; they are opened again when used."""
        for name in ("exit_head", CHECK_HEAD, "final_head"):
            self.close(name)


def head_inputs(
    session: ort.InferenceSession, hidden: Float32, blocks_run: int | Sequence[int]
) -> dict[str, Float32 | Int32]:
    """What a head takes: hidden states [rows, H], and where it knows of exits, each row's."""
    inputs: dict[str, Float32 | Int32] = {"hidden": hidden}
    if len(session.get_inputs()) > 1:
        # One for all rows, or each row's.
        inputs["blocks_run"] = np.full(len(hidden), blocks_run, np.int32)
    return inputs
