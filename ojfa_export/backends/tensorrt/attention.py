"""Launching the attention kernels (engines/kernels/attention.cu and prompt.cu)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ojfa_export.models.spec import ModelSpec

if TYPE_CHECKING:
    from ojfa_export.backends.cuda.arrays import DeviceArrays
    from ojfa_export.backends.cuda.device import Device
    from ojfa_export.backends.cuda.kernels import Argument, Kernels

# As in the kernels: threads of a warp; queries of a prompt's warp; of a step's thread block, its
# queries, and the keys that a warp takes at a time.
LANES, TILE_ROWS = 32, 16
STEP_QUERIES, STEP_KEYS = 8, 16
APPEND_THREADS = 256
# Positions of a page of the cache, as in tiles.cuh.
PAGE = 64


@dataclass(frozen=True)
class Way:
    """How a step's thread blocks go through the keys; see the kernels.

    Attributes:
        kernel: Its name.
        row_bytes: Of a key's rows that one step of all warps takes; warps follow from it.
        most_warps: Of a thread block.
        stages: Of a warp's keys in shared memory.
        resident: Thread blocks on a multiprocessor that keys are split over (bench/NOTES.md).
        most_splits: Of the keys.
    """

    kernel: str
    row_bytes: int
    most_warps: int
    stages: int
    resident: int
    most_splits: int


# Ends the name of a kernel that sees all keys, in a model with a window in some blocks.
OF_ALL = "_of_all"
NARROW = Way("attention", 1024, 4, 3, 2, 64)
WIDE = Way("wide_attention", 1024, 8, 2, 1, 8)


@dataclass(frozen=True)
class Geometry:
    """What the kernels' tiles follow from.

    Attributes:
        heads: Of queries.
        kv_heads: Of keys and values.
        head_dim: Features of a head.
        rotary_dim: Those that rotate.
        element_bytes: Of a number in matrices: 2 or 4.
        cache_bytes: Of a number in the cache: as many, or 1.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    element_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, spec: ModelSpec, element_bytes: int, cache_bytes: int) -> Geometry:
        """A model's."""
        heads = spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim
        return cls(*heads, element_bytes, cache_bytes)

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
        """Of a query in shared memory, whole tiles."""
        return math.ceil(self.head_dim / 16) * 16 * self.element_bytes

    @property
    def stride_bytes(self) -> int:
        """From a query in shared memory to the next."""
        return self.row_bytes + 16

    @property
    def cached_stride_bytes(self) -> int:
        """From a key or value in shared memory to the next."""
        return self.row_bytes // self.element_bytes * self.cache_bytes + 16


@dataclass(frozen=True)
class Launch:
    """A kernel's grid of thread blocks, threads of each and dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Chunks:
    """Consecutive tokens of some sequences, which one launch attends for.

    Attributes:
        count: Sequences.
        longest: Tokens of one at most.
        list: Address of [count, 2] int32, the first token of each and how many; 0 where all have
            `longest`, one after the other.
    """

    count: int
    longest: int
    list: int = 0


def step_launch(
    geometry: Geometry, chunks: Chunks, multiprocessors: int, most_new: int = 1
) -> Launch:
    """Attention with the keys split over thread blocks.

    Args:
        geometry: Of the model.
        chunks: Which tokens.
        multiprocessors: Of the GPU.
        most_new: Tokens of a chunk that the kernel appends itself.
    """
    tiles = math.ceil(chunks.longest * geometry.group / STEP_QUERIES)
    rows = geometry.kv_heads * tiles
    # By what doesn't depend on how many tokens a chunk has, so that each gets the same alone.
    few = most_new > 1 and 2 * geometry.kv_heads * chunks.count <= multiprocessors
    way = WIDE if few else NARROW
    splits = way.resident * multiprocessors // (rows * chunks.count)
    splits = max(1, min(way.most_splits, splits))
    warps = max(1, min(way.most_warps, way.row_bytes // geometry.row_bytes))
    # The queries, new keys and values, and each warp's stages of keys and values.
    held = (2 * most_new + warps * way.stages * 2 * STEP_KEYS) * geometry.cached_stride_bytes
    held += STEP_QUERIES * geometry.stride_bytes
    grid = (splits, rows, chunks.count)
    return Launch(way.kernel, grid, warps * LANES, held)


def prompt_launch(geometry: Geometry, chunks: Chunks) -> Launch:
    """Attention of many tokens of a sequence, whose queries share the keys that are read."""
    warps = 2 if geometry.row_bytes > 512 else 4
    keys = 16 if geometry.row_bytes > 512 else 32 if geometry.row_bytes > 256 else 64
    rows = warps * TILE_ROWS
    # Two stages of keys and values; fp32 queries stay in shared memory beside them, others lie
    # where the second stage comes later.
    stage, queries = 2 * keys * geometry.cached_stride_bytes, rows * geometry.stride_bytes
    held = stage + (stage + queries if geometry.element_bytes == 4 else max(stage, queries))
    tiles = math.ceil(chunks.longest * geometry.group / rows)
    grid = (tiles, geometry.kv_heads, chunks.count)
    return Launch("prompt_attention", grid, warps * LANES, held)


class Scratch:
    """What the thread blocks of a launch share; one launch after the other uses it.

    Args:
        device: Where it lies.
        arrays: Makes arrays there.
        geometry: Of the model.
        tokens: Of a pass at most.
    """

    def __init__(
        self, device: Device, arrays: DeviceArrays, geometry: Geometry, tokens: int
    ) -> None:
        # Where keys are split there are no more thread blocks than find room at once, and each has
        # STEP_QUERIES queries.
        parts = STEP_QUERIES * NARROW.resident * device.multiprocessors
        self.parts = arrays.lasting((parts, geometry.head_dim + 2), np.float32)
        # The same of wide thread blocks, in words, with room for all splits of a row: of two at
        # least where there are any.
        rows = max(1, WIDE.resident * device.multiprocessors // 2)
        words = rows * WIDE.most_splits * STEP_QUERIES * (geometry.head_dim + 2)
        self.words = arrays.lasting((words,), np.uint64)
        self.turns = arrays.lasting((rows,), np.uint32)
        for array in (self.words, self.turns):
            device.clear(array.pointer, array.nbytes)
        # Of few tokens of each of many sequences, or of a sequence with fewer thread blocks than
        # a prompt must have.
        tiles = max(tokens * geometry.heads, STEP_QUERIES * device.multiprocessors)
        self.finished = arrays.lasting((1, tiles), np.uint32)
        device.clear(self.finished.pointer, self.finished.nbytes)

    def of(self, kernel: str) -> tuple[int, int]:
        """Addresses of what a step's kernel is given: parts, and counters."""
        if kernel == WIDE.kernel:
            return self.words.pointer, self.turns.pointer
        return self.parts.pointer, self.finished.pointer


@dataclass(frozen=True)
class Operands:
    """Device addresses of what attention reads and writes.

    Attributes:
        out: [tokens, heads * head_dim].
        qkv: [tokens, (heads + 2 kv_heads) head_dim] fp32.
        keys: [pages, kv_heads, PAGE, head_dim].
        values: The same.
        cosines: [rows, rotary_dim / 2] fp32.
        sines: The same.
        positions: [tokens] int32.
        sequences: [tokens] int32, each token's.
        table: [sequences, most_pages] int32, the pages of each.
        most_pages: Of a sequence.
        scale: Factor on q.k.
        of_all: Whether every key is seen, in a model with a window in other blocks.
    """

    out: int
    qkv: int
    keys: int
    values: int
    cosines: int
    sines: int
    positions: int
    sequences: int
    table: int
    most_pages: int
    scale: float
    of_all: bool = False

    @property
    def cache(self) -> tuple[Argument, ...]:
        """Arguments of every kernel."""
        return (
            *_pointers(self.qkv, self.keys, self.values, self.cosines, self.sines),
            *_pointers(self.positions, self.sequences, self.table),
            (self.most_pages, ctypes.c_int),
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
        most_new: Tokens of a chunk that a step appends itself, as it attends: 1 to STEP_QUERIES.
            For more, `append` is a kernel before it.
    """

    def __init__(
        self, kernels: Kernels, geometry: Geometry, multiprocessors: int, most_new: int = 1
    ) -> None:
        self._kernels, self._geometry = kernels, geometry
        self._multiprocessors, self._most_new = multiprocessors, most_new

    def run(
        self, operands: Operands, scratch: Scratch, tokens: int, launches: Sequence[Chunks]
    ) -> None:
        """Appends the tokens' keys and values to the cache and attends.

        Args:
            operands: What to read and write.
            scratch: For this many tokens.
            tokens: Of the pass.
            launches: All of them, in one or more launches.
        """
        if any(chunks.longest > self._most_new for chunks in launches):
            self.append(operands, tokens)
        for chunks in launches:
            if self.is_prompt(chunks):
                self.prompt(operands, chunks)
            else:
                self.step(operands, scratch, chunks, overlapping=len(launches) == 1)

    def is_prompt(self, chunks: Chunks) -> bool:
        """Whether queries that share keys are worth more than keys that are split."""
        if chunks.longest <= STEP_QUERIES:
            return False
        grid = prompt_launch(self._geometry, chunks).grid
        return 2 * math.prod(grid) >= self._multiprocessors

    def step(
        self, operands: Operands, scratch: Scratch, chunks: Chunks, *, overlapping: bool = True
    ) -> None:
        """Attends with keys split over thread blocks; appends the tokens of short chunks itself."""
        launch = step_launch(self._geometry, chunks, self._multiprocessors, self._most_new)
        arguments = (
            *operands.whole,
            *((each, ctypes.c_int) for each in (chunks.longest, self._most_new)),
            *_pointers(chunks.list, *scratch.of(launch.kernel)),
        )
        # What `append` has just written must be there before keys are read.
        self._launch(
            _kernel_of(operands, launch),
            arguments,
            overlapping=overlapping and chunks.longest <= self._most_new,
        )

    def prompt(self, operands: Operands, chunks: Chunks) -> None:
        """Attends for many tokens, which have been appended."""
        arguments = (
            *operands.whole,
            (chunks.longest, ctypes.c_int),
            *_pointers(chunks.list),
        )
        launch = _kernel_of(operands, prompt_launch(self._geometry, chunks))
        self._launch(launch, arguments, overlapping=False)

    def append(self, operands: Operands, tokens: int) -> None:
        """Writes the tokens' keys and values to the cache."""
        geometry = self._geometry
        each = math.ceil(geometry.kv_heads * geometry.head_dim / geometry.vector / APPEND_THREADS)
        launch = Launch("append", (tokens, each, 1), APPEND_THREADS, 0)
        self._launch(launch, operands.cache, overlapping=True)

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


def _kernel_of(operands: Operands, launch: Launch) -> Launch:
    """The same of the kernel that sees the keys that a block does."""
    return replace(launch, kernel=f"{launch.kernel}{OF_ALL}") if operands.of_all else launch


def _pointers(*addresses: int) -> tuple[Argument, ...]:
    return tuple((address, ctypes.c_void_p) for address in addresses)
