"""An opened model on ONNX Runtime's CPU provider: a session for each graph, when it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from ojfa_export.backends.onnxruntime.ports import check_ports
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.backends.rotations import rows_of_sets
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.models.spec import ModelSpec


class OpenedModel:
    """Sessions and tables that passes and heads need.

    Args:
        spec: The model.
        weights: Directory of the weight files.
        engines: Engine files by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.

    Attributes:
        depths: Of a draft layer: blocks run before each of the states that it sees.
    """

    depths: tuple[int, ...] = ()

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

    def graph_of(self, block: int) -> str:
        """The name of a block's graph."""
        return block_name(block)

    def session(self, name: str) -> ort.InferenceSession:
        """The session of a graph, opened on first use."""
        if name not in self._sessions:
            model = self._files.read(self._engines[name])
            session = open_session(model, name, self._weights, self._files)
            check_ports(session, self.spec, name, len(self.depths))
            self._sessions[name] = session
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Closes the session of a graph; bindings to it must be dropped as well."""
        self._sessions.pop(name, None)

    def rotary_tables(self, *, long_context: bool) -> dict[str, Float32]:
        """The tables of rotations, as blocks take them."""
        if self.rotary is None:
            return {}
        sets = rows_of_sets(self.spec, len(self.rotary[0]), long_context=long_context)
        tables = [table[rows] for rows in sets for table in self.rotary]
        names = (f"rotary_{name}_table" for name in self.spec.rotations)
        return dict(zip(names, tables, strict=True))
