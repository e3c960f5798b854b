"""Draft layers on ONNX Runtime's CPU provider: a block of their own, run as the model's are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.draft import DraftLayer, token_bytes
from ojfa_export.backends.onnxruntime.executor import OnnxRuntimeExecutor
from ojfa_export.backends.onnxruntime.opened import OpenedModel
from ojfa_export.backends.onnxruntime.slots import SlotArray
from ojfa_export.backends.passes import Chunk, cut_pass, load_chunks, row_ranges, store_chunks
from ojfa_export.bundle.names import DRAFT_GRAPHS
from ojfa_export.decoding.arrays import Float32

MEMORY, LAYER, HEAD = DRAFT_GRAPHS
# Positions of prompts that run at once: their states lie side by side for that.
MOST_POSITIONS = 1024


class OnnxRuntimeDraft(OpenedModel, ChoosesOnHost):
    """An opened draft layer; see `backends.draft.DraftEngines`.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: DraftLayer) -> None:
        super().__init__(layer.spec, layer.weights, layer.engines, layer.rotary, layer.files)
        self.depths, self.token_bytes, self.takes_whole = layer.depths, token_bytes(layer, 4), False
        self._tokens, self._vocab_size = layer.tokens, layer.vocab_size

    def graph_of(self, block: int) -> str:
        """The name of the one block's graph."""
        return LAYER

    def executor(self, slots: int, capacity: int) -> OnnxRuntimeDraftExecutor:
        """Makes a cache; memory is taken as positions are written."""
        return OnnxRuntimeDraftExecutor(self, slots, capacity)

    def memory(self, states: Float32) -> Float32:
        """What the layer sees of positions [n, H], of their states side by side."""
        result: Float32 = self.session(MEMORY).run(None, {"states": states})[0]
        return result

    def logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """See `backends.draft.DraftEngines`."""
        found: Float32 = self.session(HEAD).run(None, {"hidden": hidden})[0]
        if self._tokens is None:
            return found
        logits = np.full((len(hidden), self._vocab_size), -np.inf, np.float32)
        logits[:, self._tokens] = found
        return logits


class OnnxRuntimeDraftExecutor(OnnxRuntimeExecutor):
    """The layer's cache, and room [slots, capacity, depths H] for states that it is given.

    Args:
        layer: The opened layer.
        slots: Sequences.
        capacity: Positions of each.
    """

    def __init__(self, layer: OnnxRuntimeDraft, slots: int, capacity: int) -> None:
        super().__init__(layer, slots, capacity)
        self._layer, self._hidden_size = layer, layer.spec.hidden_size
        kept = SlotArray((slots, capacity, len(layer.depths) * self._hidden_size))
        self._states.append(kept)  # given back with all else
        self._kept = kept.array

    def keep(self, index: int, chunks: Sequence[Chunk], hidden: Float32) -> None:
        """See `backends.draft.DraftExecutor`."""
        first = index * self._hidden_size
        store_chunks(self._kept[:, :, first : first + self._hidden_size], chunks, hidden)

    def begin(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> Float32:
        """See `backends.draft.DraftExecutor`."""
        last: dict[int, Float32] = {}
        at = 0
        for piece in cut_pass(chunks, MOST_POSITIONS):
            memory = self._layer.memory(load_chunks(np, self._kept, piece))
            outputs = self._run_layer(memory, tokens[at : at + len(memory)], piece)
            at += len(memory)
            for chunk, rows in zip(piece, row_ranges(piece), strict=True):
                last[chunk.slot] = outputs[rows.stop - 1].copy()
        return np.stack([last[chunk.slot] for chunk in chunks])

    def go_on(self, hidden: Float32, tokens: Sequence[int], chunks: Sequence[Chunk]) -> Float32:
        """See `backends.draft.DraftExecutor`."""
        return self._run_layer(hidden, tokens, chunks).copy()

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """See `backends.draft.DraftExecutor`."""
        super().copy_prefix(source, target, count)
        self._kept[target, :count] = self._kept[source, :count]

    def _run_layer(
        self, memory: Float32, tokens: Sequence[int], chunks: Sequence[Chunk]
    ) -> Float32:
        beside = {"token_ids": np.array(tokens, np.int32)}
        return self.run(range(1), memory, chunks, long_context=False, beside=beside)
