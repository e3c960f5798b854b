"""The KV cache of an executor: its pages, and attention over them."""

from __future__ import annotations

from ojfa_export.backends.cuda.arrays import DTYPES
from ojfa_export.backends.cuda.sources import SMALL_WIDTH
from ojfa_export.backends.tensorrt.attention import PAGE, STEP_QUERIES, Attention, Geometry, Scratch
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.pages import PageTable
from ojfa_export.backends.tensorrt.plan import PASS_TOKENS


class KvCache:
    """What the blocks of an executor share; keys and values are each block's own.

    Args:
        model: The opened model.
        slots: Sequences.
        capacity: Positions of each at most.
        pages: That there are; None for all that all slots may need.

    Attributes:
        pages: Of each slot.
        shape: Of a block's keys, and of its values.
        attention: Reads and writes them.
        scratch: For attention.
    """

    def __init__(
        self, model: OpenedModel, slots: int, capacity: int, pages: int | None = None
    ) -> None:
        spec, device = model.spec, model.device
        self.pages = PageTable(device, slots, capacity, pages)
        self.shape = (self.pages.count, spec.kv_heads, PAGE, spec.head_dim)
        geometry = Geometry.of(spec, DTYPES[model.precision].itemsize, model.cache_dtype.itemsize)
        # Of a small model a kernel less for every block is worth most.
        most_new = STEP_QUERIES if spec.hidden_size <= SMALL_WIDTH else 1
        self.attention = Attention(
            model.kernels[model.precision], geometry, device.multiprocessors, most_new
        )
        self.scratch = Scratch(device, model.arrays, geometry, PASS_TOKENS)
