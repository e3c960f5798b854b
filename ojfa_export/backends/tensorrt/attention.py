"""Launching the attention kernels (engines/kernels/attention.cu and prompt.cu)."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ojfa_export.models.spec import ModelSpec

if TYPE_CHECKING:
    from ojfa_export.backends.cuda.arrays import DeviceArrays
    from ojfa_export.backends.cuda.device import Device
    from ojfa_export.backends.cuda.kernels import Argument, Kernels

# As in the kernels: threads of a warp; queries of a prompt's warp; of a step's thread block, its
# queries, the warps at most, the keys that one takes at a time, and their stages in shared memory.
LANES, TILE_ROWS = 32, 16
STEP_QUERIES, MOST_WARPS, STEP_KEYS, STEP_STAGES = 8, 4, 16, 3
APPEND_THREADS = 256
MOST_SPLITS = 64
# Thread blocks on a multiprocessor that keys of a step are split over (bench/NOTES.md).
RESIDENT = 2


@dataclass(frozen=True)
class Geometry:
    """What the kernels' tiles follow from.

    Attributes:
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Features of a head.
        rotary_dim: Those that rotate.
        element_bytes: Of a number in the cache: 2 or 4.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    element_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, element_bytes: int) -> Geometry:
        """A model's."""
        return cls(spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim, element_bytes)

    @property
    def group(self) -> int:
        """Heads that share keys and values."""
        return self.heads // self.kv_heads

    @property
    def vector(self) -> int:
        """Features that a thread loads, rotates and stores at once."""
        return math.gcd(self.head_dim, self.rotary_dim // 2, 4)

    @property
    def row_bytes(self) -> int:
        """Of a key in shared memory, whole tiles."""
        return math.ceil(self.head_dim / 16) * 16 * self.element_bytes

    @property
    def stride_bytes(self) -> int:
        """From a row in shared memory to the next."""
        return self.row_bytes + 16


@dataclass(frozen=True)
class Launch:
    """A kernel's grid of thread blocks, threads of each and dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


def step_launch(geometry: Geometry, sequences: int, tokens: int, multiprocessors: int) -> Launch:
    """Attention with the keys split over thread blocks.

    Args:
        geometry: Of the model.
        sequences: How many.
        tokens: Of each.
        multiprocessors: Of the GPU.
    """
    tiles = math.ceil(tokens * geometry.group / STEP_QUERIES)
    rows = geometry.kv_heads * tiles
    splits = max(1, min(MOST_SPLITS, RESIDENT * multiprocessors // (rows * sequences)))
    warps = max(1, min(MOST_WARPS, 1024 // geometry.row_bytes))
    # The queries, the new key and value, and each warp's stages of keys and values.
    held = STEP_QUERIES + 2 + warps * STEP_STAGES * 2 * STEP_KEYS
    return Launch(
        "attention", (splits, rows, sequences), warps * LANES, held * geometry.stride_bytes
    )


def prompt_launch(geometry: Geometry, tokens: int) -> Launch:
    """Attention of a sequence's many tokens, whose queries share the keys that are read."""
    warps = 2 if geometry.row_bytes > 512 else 4
    keys = 16 if geometry.row_bytes > 512 else 32 if geometry.row_bytes > 256 else 64
    rows = warps * TILE_ROWS
    # Two stages of keys and values; fp32 queries stay in shared memory beside them.
    held = 2 * 2 * keys + (0 if geometry.element_bytes == 2 else rows)
    grid = (math.ceil(tokens * geometry.group / rows), geometry.kv_heads, 1)
    return Launch("prompt_attention", grid, warps * LANES, held * geometry.stride_bytes)


class Scratch:
    """What the thread blocks of a step share, for steps of this many tokens.

    Args:
        device: Where it lies.
        arrays: Makes arrays there.
        geometry: Of the model.
        tokens: How many.
    """

    def __init__(
        self, device: Device, arrays: DeviceArrays, geometry: Geometry, tokens: int
    ) -> None:
        splits = max(
            step_launch(geometry, *counts, device.multiprocessors).grid[0]
            for counts in ((tokens, 1), (1, tokens))
        )
        shape = (tokens, geometry.heads, splits if splits > 1 else 0, geometry.head_dim + 2)
        self.parts = arrays.empty(shape, np.float32)
        tiles = geometry.kv_heads * math.ceil(geometry.group / STEP_QUERIES)
        self.finished = arrays.empty((tokens, tiles), np.uint32)
        device.clear(self.finished.pointer, self.finished.nbytes)


@dataclass(frozen=True)
class Operands:
    """Device addresses of what attention reads and writes.

    Attributes:
        out: [tokens, heads * head_dim].
        qkv: [tokens, (heads + 2 kv_heads) head_dim] fp32.
        keys: [sequences, kv_heads, capacity, head_dim].
        values: The same.
        cosines: [rows, rotary_dim / 2] fp32.
        sines: The same.
        positions: [tokens] int32.
        sequences: [tokens] int32, each token's.
        capacity: Positions of a sequence in the cache.
        scale: Factor on q.k.
    """

    out: int
    qkv: int
    keys: int
    values: int
    cosines: int
    sines: int
    positions: int
    sequences: int
    capacity: int
    scale: float

    @property
    def cache(self) -> tuple[Argument, ...]:
        """Arguments of every kernel."""
        return (
            *_pointers(self.qkv, self.keys, self.values, self.cosines, self.sines),
            *_pointers(self.positions, self.sequences),
            (self.capacity, ctypes.c_int),
        )

    @property
    def whole(self) -> tuple[Argument, ...]:
        """Arguments of the kernels that attend."""
        return (*_pointers(self.out), *self.cache, (self.scale, ctypes.c_float))


class Attention:
    """Attention over the cache in place.

    Args:
        kernels: Compiled for the model and a precision.
        geometry: Of the model in that precision.
        multiprocessors: Of the GPU.
    """

    def __init__(self, kernels: Kernels, geometry: Geometry, multiprocessors: int) -> None:
        self._kernels, self._geometry = kernels, geometry
        self._multiprocessors = multiprocessors

    def run(
        self,
        operands: Operands,
        scratch: Scratch,
        tokens: int,
        *,
        together: bool,
    ) -> None:
        """Appends the tokens' keys and values to the cache and attends.

        Args:
            operands: What to read and write.
            scratch: For this many tokens.
            tokens: How many.
            together: Whether they are of different sequences, one each; else consecutive ones
                of one sequence.
        """
        if together:
            self.step(operands, scratch, tokens, 1)
            return
        prompt = prompt_launch(self._geometry, tokens)
        # With fewer thread blocks than half of the multiprocessors, splitting keys is worth more.
        if 2 * math.prod(prompt.grid) >= self._multiprocessors:
            self.prompt(operands, tokens)
        else:
            self.step(operands, scratch, 1, tokens)

    def step(
        self,
        operands: Operands,
        scratch: Scratch,
        sequences: int,
        tokens: int,
    ) -> None:
        """The same, keys split over thread blocks; `tokens` of each sequence."""
        if tokens > 1:
            self._append(operands, sequences * tokens)
        launch = step_launch(self._geometry, sequences, tokens, self._multiprocessors)
        arguments = (
            *operands.whole,
            (tokens, ctypes.c_int),
            *_pointers(scratch.parts.pointer, scratch.finished.pointer),
        )
        self._launch(launch, arguments, overlapping=tokens == 1)

    def prompt(self, operands: Operands, tokens: int) -> None:
        """The same for many tokens of one sequence."""
        self._append(operands, tokens)
        arguments = (*operands.whole, (tokens, ctypes.c_int))
        self._launch(prompt_launch(self._geometry, tokens), arguments, overlapping=False)

    def _append(self, operands: Operands, tokens: int) -> None:
        geometry = self._geometry
        each = math.ceil(geometry.kv_heads * geometry.head_dim / geometry.vector / APPEND_THREADS)
        launch = Launch("append", (tokens, each, 1), APPEND_THREADS, 0)
        self._launch(launch, operands.cache, overlapping=False)

    def _launch(
        self, launch: Launch, arguments: tuple[Argument, ...], *, overlapping: bool
    ) -> None:
        self._kernels.launch(
            launch.kernel,
            launch.grid,
            (launch.threads, 1, 1),
            arguments,
            shared_bytes=launch.shared_bytes,
            overlapping=overlapping,
        )


def _pointers(*addresses: int) -> tuple[Argument, ...]:
    return tuple((address, ctypes.c_void_p) for address in addresses)
