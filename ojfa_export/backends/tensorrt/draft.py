"""Draft layers on the GPU; see `backends.draft`."""

from __future__ import annotations

from ojfa_export.backends.draft import DraftLayer
from ojfa_export.backends.tensorrt.draft_executor import TensorRtDraftExecutor
from ojfa_export.backends.tensorrt.draft_model import DRAFT_TOKENS, DraftModel
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.errors import BackendError


class TensorRtDraft(DraftModel):
    """An opened draft layer; see `backends.draft.DraftEngines`.

    Args:
        engines: Of the model.
        layer: The layer.
    """

    def __init__(self, engines: TensorRtEngines, layer: DraftLayer) -> None:
        super().__init__(engines, layer)
        self._of_model = engines

    def executor(self, slots: int, capacity: int) -> TensorRtDraftExecutor:
        """Makes a cache; it takes memory when it is first used.

        Raises:
            BackendError: Steps run in TensorRT's engines here, of which a layer has none.
        """
        if self.products(1) is None:
            raise BackendError(
                "the draft layer has no engines of TensorRT, and OJFA_DECODE=engines is set",
                hint="unset OJFA_DECODE, or draft at an exit from 1 on",
            )
        if self.products(DRAFT_TOKENS) is None:
            raise BackendError(
                "the draft layer needs cuBLASLt for prompts, which is not installed",
                hint="pip install nvidia-cublas (nvidia-cublas-cu12 for a driver of CUDA 12), or "
                "draft at an exit from 1 on",
            )
        return TensorRtDraftExecutor(self, self._of_model, slots, capacity)
