"""An opened model on ONNX Runtime's CPU provider: a session for each block and head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.onnxruntime.executor import OnnxRuntimeExecutor
from ojfa_export.backends.onnxruntime.ports import check_ports
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import block_name
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.models.spec import ModelSpec


class OnnxRuntimeEngines(ChoosesOnHost):
    """An opened model.

    Args:
        spec: The model.
        weights: Directory of the weight files.
        engines: Engine files by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> None:
        self.spec = spec
        self.rotary = rotary
        self._weights, self._files = weights, files
        self._engines = engines
        self._sessions: dict[str, ort.InferenceSession] = {}

    def session(self, name: str) -> ort.InferenceSession:
        """The session of a graph, opened on first use."""
        if name not in self._sessions:
            model = self._files.read(self._engines[name])
            session = open_session(model, name, self._weights, self._files)
            check_ports(session, self.spec, name)
            self._sessions[name] = session
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Closes the session of a graph; bindings to it must be dropped as well."""
        self._sessions.pop(name, None)

    def load_blocks(self, depth: int) -> None:
        """Opens the sessions of the embedding and the first blocks."""
        for name in ("embed", *map(block_name, range(depth))):
            self.session(name)

    def executor(self, slots: int, capacity: int) -> OnnxRuntimeExecutor:
        """Makes a KV cache; memory is taken as positions are written."""
        return OnnxRuntimeExecutor(self, slots, capacity)

    def rotary_tables(self, *, long_context: bool) -> dict[str, Float32]:
        """The tables of rotations, as blocks take them; LongRoPE has a second set of rows."""
        if self.rotary is None:
            return {}
        cos, sin = self.rotary
        if self.spec.rotary_switch is not None:
            half = len(cos) // 2
            part = slice(half, None) if long_context else slice(half)
            cos, sin = cos[part], sin[part]
        return {"rotary_cos_table": cos, "rotary_sin_table": sin}

    def logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """Applies the model's own head, or the exit head: [rows, H] to [rows, V]."""
        session = self.session("final_head" if blocks_run == self.spec.blocks else "exit_head")
        result: Float32 = session.run(None, head_inputs(session, hidden, blocks_run))[0]
        return result

    def unload_heads(self) -> None:
        """Closes both heads; they are opened again when used."""
        for name in ("exit_head", "final_head"):
            self.close(name)


def head_inputs(
    session: ort.InferenceSession, hidden: Float32, blocks_run: int
) -> dict[str, Float32 | Int32]:
    """What a head takes: hidden states [rows, H], and where it has gates, each row's exit."""
    inputs: dict[str, Float32 | Int32] = {"hidden": hidden}
    if len(session.get_inputs()) > 1:
        inputs["blocks_run"] = np.full(len(hidden), blocks_run, np.int32)
    return inputs
