"""The heads of exits against logits in float64: those of the graphs, and those of engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.checks import checking
from ojfa_export.backends.frugal import is_large
from ojfa_export.backends.onnxruntime.portable import PortableGraphs
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.shortcut_file import ExitShortcut
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.models.spec import ModelSpec
from ojfa_export.verify.exit_blocks import exit_block_in_pieces, graph_outputs
from ojfa_export.verify.tolerances import Comparisons


@dataclass(frozen=True)
class ExitHeads:
    """What gives an exit's logits: its head, a block before it, and a check head.

    Attributes:
        spec: The model.
        graphs: Portable ones.
        engines: Opened.
        shortcut: That they were made of.
        check_tokens: Ids [n] that the logits of a check head are of, where there is one.
    """

    spec: ModelSpec
    graphs: PortableGraphs
    engines: Engines
    shortcut: ExitShortcut
    check_tokens: Int32 | None

    def compare(
        self,
        token_ids: Int32,
        hidden: Float32,
        blocks_run: int,
        target: NDArray[np.float64],
        allowance: NDArray[np.float64],
        comparisons: Comparisons,
    ) -> None:
        """Records comparisons at an exit.

        Args:
            token_ids: [B,n].
            hidden: [B,n,H] after the exit's blocks.
            blocks_run: The exit.
            target: Its logits [B n,V].
            allowance: As of `exit_allowance`.
            comparisons: Where they are recorded.
        """
        by_graphs, by_engines = self._seen(token_ids, hidden, blocks_run)
        name = "exit_block" if isinstance(self.shortcut, BlockShortcut) else "exit_head"
        actual = self.graphs.logits(by_graphs, blocks_run)
        if is_large(self.spec):
            self.graphs.close()  # a residual shortcut's holds the whole LM head, as the engine does
        comparisons.record(f"graph {name}", "logits", actual, target, allowance)
        actual = self.engines.logits(by_engines, blocks_run)
        comparisons.record(f"engine {name}", "logits", actual, target, allowance)
        checks, ids = checking(self.engines), self.check_tokens
        if checks is None or ids is None:
            return
        actual = self.graphs.check_logits(by_graphs, blocks_run)
        self.graphs.close()
        comparisons.record("graph check_head", "logits", actual, target[:, ids], allowance)
        actual = checks.check_logits(by_engines, blocks_run)
        comparisons.record("engine check_head", "logits", actual, target[:, ids], allowance)

    def _seen(self, token_ids: Int32, hidden: Float32, blocks_run: int) -> tuple[Float32, Float32]:
        """What heads see [B n,H]: of the graphs, and of engines."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if not isinstance(self.shortcut, BlockShortcut):
            return rows, rows
        by_graphs = graph_outputs(self.graphs, self.shortcut, blocks_run, token_ids, hidden)
        by_engines, _ = exit_block_in_pieces(self.engines, blocks_run, hidden)
        return by_graphs, by_engines.reshape(rows.shape)
