"""A draft layer's block on the GPU: a block, and what it sees (engines/kernels/draft.cu)."""

from __future__ import annotations

from dataclasses import dataclass

from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray
from ojfa_export.backends.cuda.kernels import integer, number, pointer
from ojfa_export.backends.tensorrt.blocks import Block
from ojfa_export.backends.tensorrt.cache import KvCache
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.backends.tensorrt.workspace import Workspace
from ojfa_export.bundle.names import DRAFT_GRAPHS

MEMORY, _, _ = DRAFT_GRAPHS
SEE_THREADS = 256  # as in the kernels


@dataclass(frozen=True)
class Steps:
    """Where a pass of the layer finds its tokens; addresses are the device's or the host's.

    Attributes:
        ids: Of each position's next token, [tokens] int32.
        names: Ids by what `ids` hold, [D] int32; 0 where those are ids.
        named: Where ids go, if anywhere.
        stride: From an id there to the next.
        positions: Of the positions, [tokens] int32.
        further: Added to them.
    """

    ids: int
    positions: int
    names: int = 0
    named: int = 0
    stride: int = 1
    further: int = 0


class DraftBlock(Block):
    """The layer's block, its keys and values.

    Args:
        model: The layer, opened as a model of one block.
        cache: Of the executor.
    """

    def __init__(self, model: OpenedModel, cache: KvCache) -> None:
        super().__init__(model, 0, cache)
        dtype, tokens = DTYPES[model.precision], model.pass_tokens
        self._kernels = model.kernels[model.precision]
        self._fuse = model.weights(MEMORY)["fuse.weight"]
        self._states = model.arrays.lasting((tokens, self._fuse.shape[1]), dtype)
        self._seen = model.arrays.lasting((tokens, 2 * model.spec.hidden_size), dtype)

    def remember(self, workspace: Workspace, kept: DeviceArray, positions: int) -> None:
        """Puts the memory of positions on the stream, into the workspace's first buffer.

        Args:
            workspace: The positions'.
            kept: States [depths, slots, capacity, H].
            positions: Address of the positions.
        """
        depths, slots, capacity, width = kept.shape
        count = workspace.tokens
        states = self._states[:count]
        self._kernels.launch(
            "side_by_side",
            (count, depths, 1),
            (SEE_THREADS, 1, 1),
            (
                *(pointer(states.pointer), pointer(kept.pointer), pointer(positions)),
                *workspace.places(),
                *map(integer, (slots, capacity, width)),
            ),
            overlapping=True,
        )
        products = self._model.products(count)
        assert products is not None
        products.linear(workspace.hidden[0], None, states, self._fuse, None)

    def step(self, workspace: Workspace, memory: DeviceArray, steps: Steps) -> None:
        """Puts the layer on the stream; its output is the workspace's second buffer.

        Args:
            workspace: The positions'.
            memory: [tokens, H].
            steps: Where the tokens are.
        """
        weights, spec = self._model.weights(self._name), self._model.spec
        norms = (weights[f"{name}.norm.weight"] for name in ("embedding", "attention"))
        self._kernels.launch(
            "see",
            (workspace.tokens, 2, 1),
            (SEE_THREADS, 1, 1),
            (
                *map(pointer, (self._seen.pointer, workspace.hidden[0].pointer, memory.pointer)),
                pointer(weights["token_embedding"].pointer),
                *(pointer(norm.pointer) for norm in norms),
                number(spec.norm_epsilon),
                *map(pointer, (steps.ids, steps.names, steps.named)),
                integer(steps.stride),
                *map(pointer, (steps.positions, workspace.positions)),
                *map(integer, (steps.further, spec.hidden_size)),
            ),
            overlapping=True,
        )
        self.run(workspace, False)

    def name(self, rows: int, steps: Steps) -> None:
        """Puts on the stream what writes down ids that no step of the layer has seen."""
        self._kernels.launch(
            "name_tokens",
            (1, 1, 1),
            (rows, 1, 1),
            (*map(pointer, (steps.named, steps.ids, steps.names)), integer(steps.stride)),
            overlapping=True,
        )

    def _qkv_by_kernels(self, workspace: Workspace, products: Products) -> None:
        weights = self._model.weights(self._name)
        seen = self._seen[: workspace.tokens]
        products.linear(workspace.qkv, None, seen, weights["attention.qkv.weight"], None)
