"""The CUDA kernels that every step needs, in NumPy, and a compiler that keeps the macros."""

from __future__ import annotations

import ctypes
import enum
import json
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Macros = dict[str, int]
Grid = tuple[int, int, int]


def at(pointer: int, dtype: Any, *shape: int) -> NDArray[Any]:
    """An array at an address."""
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(pointer)
    return np.frombuffer(buffer, dtype).reshape(shape)


def element(macros: Macros) -> Any:
    return np.float16 if macros["HALF"] else np.float32


def embed(macros: Macros, grid: Grid, arguments: tuple[Any, ...]) -> None:
    hidden, table, learned, ids, positions, features = arguments
    tokens = grid[0]
    out = at(hidden, np.float32, tokens, features)
    for token, (row, place) in enumerate(
        zip(at(ids, np.int32, tokens), at(positions, np.int32, tokens), strict=True)
    ):
        size = np.dtype(element(macros)).itemsize * features
        out[token] = at(table + int(row) * size, element(macros), features)
        if learned:
            out[token] += at(learned + int(place) * size, element(macros), features)


def transpose(macros: Macros, _: Grid, arguments: tuple[Any, ...]) -> None:
    out, source, rows, columns = arguments
    kind = element(macros)
    at(out, kind, columns, rows)[:] = at(source, kind, rows, columns).T


def _rotated(macros: Macros, heads: NDArray[Any], cos: Any, sin: Any) -> NDArray[Any]:
    half = macros["ROTARY_DIM"] // 2
    if not half:
        return heads
    first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class _Token:
    """One token's part of the attention kernels' arguments."""

    def __init__(self, macros: Macros, token: int, arguments: tuple[Any, ...]) -> None:
        qkv, keys, values, cos, sin, positions, sequences, capacity = arguments
        heads, kv_heads, size = macros["HEADS"], macros["KV_HEADS"], macros["HEAD_DIM"]
        self.position = int(at(positions + 4 * token, np.int32, 1)[0])
        sequence = int(at(sequences + 4 * token, np.int32, 1)[0])
        width = heads + 2 * kv_heads
        row = at(qkv + 4 * token * width * size, np.float32, width, size)
        half = macros["ROTARY_DIM"] // 2
        turns = [
            at(table + 4 * self.position * half, np.float32, half) if half else 0
            for table in (cos, sin)
        ]
        self.queries = _rotated(macros, row[:heads], *turns)
        self.key = _rotated(macros, row[heads : heads + kv_heads], *turns)
        self.value = row[heads + kv_heads :]
        kind = element(macros)
        shape = (kv_heads, capacity, size)
        skipped = sequence * int(np.prod(shape)) * np.dtype(kind).itemsize
        self.keys = at(keys + skipped, kind, *shape)
        self.values = at(values + skipped, kind, *shape)

    def append(self) -> None:
        self.keys[:, self.position] = self.key
        self.values[:, self.position] = self.value

    def attend(self, macros: Macros, scale: float) -> NDArray[Any]:
        first = max(0, self.position + 1 - macros["WINDOW"]) if macros["WINDOW"] else 0
        seen = slice(first, self.position + 1)
        group = macros["HEADS"] // macros["KV_HEADS"]
        keys, values = (
            np.repeat(each[:, seen].astype(np.float32), group, axis=0)
            for each in (self.keys, self.values)
        )
        scores = scale * np.einsum("hd,hkd->hk", self.queries, keys)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed = np.einsum("hk,hkd->hd", weights / weights.sum(axis=1, keepdims=True), values)
        return mixed.reshape(-1)


def append(macros: Macros, grid: Grid, arguments: tuple[Any, ...]) -> None:
    for token in range(grid[1]):
        _Token(macros, token, arguments).append()


def attention(macros: Macros, grid: Grid, arguments: tuple[Any, ...]) -> None:
    out, *cache, scale, _parts, _finished, appending = arguments
    tokens, width = grid[2], macros["HEADS"] * macros["HEAD_DIM"]
    result = at(out, element(macros), tokens, width)
    for index in range(tokens):
        token = _Token(macros, index, tuple(cache))
        if appending:
            token.append()
        result[index] = token.attend(macros, scale)


def linear(macros: Macros, tokens: int, arguments: tuple[Any, ...]) -> None:
    out, residual, x, matrix, bias, columns, outputs = arguments
    # Of a residual jump, whose matrices are fp32.
    result = at(x, np.float32, tokens, columns) @ at(matrix, np.float32, outputs, columns).T
    if bias:
        result = result + at(bias, np.float32, outputs)
    if residual:
        result = result + at(residual, np.float32, tokens, outputs)
    at(out, np.float32, tokens, outputs)[:] = result


KERNELS = {
    "embed": embed,
    "transpose": transpose,
    "append": append,
    "attention": attention,
    "linear_1": lambda macros, _, arguments: linear(macros, 1, arguments),
    "linear_2": lambda macros, _, arguments: linear(macros, 2, arguments),
}


def compiler() -> ModuleType:
    """A module `cuda.bindings.nvrtc` whose programs are the macros that they were given."""
    module = ModuleType("cuda.bindings.nvrtc")
    result = enum.IntEnum("nvrtcResult", {"NVRTC_SUCCESS": 0, "NVRTC_ERROR_COMPILATION": 6})
    done = result.NVRTC_SUCCESS

    def compile_program(program: dict[str, Any], _: int, options: list[bytes]) -> tuple[Any]:
        given = [option.decode() for option in options if option.startswith(b"-D")]
        pairs = (option.removeprefix("-D").split("=") for option in given)
        program["code"] = json.dumps({name: int(value) for name, value in pairs}).encode()
        return (done,)

    def get_code(program: dict[str, Any], code: bytes) -> tuple[Any]:
        # As the bindings do it: into the memory of the bytes that were given.
        ctypes.memmove(code, program["code"], len(program["code"]))
        return (done,)

    module.nvrtcResult = result  # type: ignore[attr-defined]
    module.nvrtcCreateProgram = lambda *_: (done, {})  # type: ignore[attr-defined]
    module.nvrtcCompileProgram = compile_program  # type: ignore[attr-defined]
    module.nvrtcGetCUBINSize = lambda program: (done, len(program["code"]))  # type: ignore[attr-defined]
    module.nvrtcGetCUBIN = get_code  # type: ignore[attr-defined]
    module.nvrtcDestroyProgram = lambda _: (done,)  # type: ignore[attr-defined]
    return module
