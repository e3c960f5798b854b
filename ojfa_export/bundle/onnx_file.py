"""What an ONNX file takes and gives, and where its tensors lie, read without the onnx package.

Running a bundle doesn't need onnx, and must know which bytes a graph refers to before anything
opens it. Of the format's messages (onnx.proto) only those on the way to tensors are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

# Of TensorProto.DataType: as ports are described, and bytes of an element.
DTYPES = {
    1: ("float", 4),
    2: ("uint8", 1),
    3: ("int8", 1),
    6: ("int32", 4),
    7: ("int64", 8),
    9: ("bool", 1),
    10: ("float16", 2),
    11: ("double", 8),
    16: ("bfloat16", 2),
}

LARGEST = 2**63 - 1  # numbers above are negative ones


@dataclass(frozen=True)
class OnnxPort:
    """An input or output: dimensions are sizes, or names of what may vary."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxTensor:
    """A tensor in another file.

    Attributes:
        location: The file, relative to where the graph's weights are.
        offset: Of its first byte.
        length: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file.

    Attributes:
        tensors: By name; those in other files.
    """

    inputs: tuple[OnnxPort, ...]
    outputs: tuple[OnnxPort, ...]
    tensors: dict[str, OnnxTensor]


def read_onnx(data: bytes) -> OnnxFile:
    """Reads a serialised graph.

    Raises:
        ValueError: It is damaged, or has parts that no graph of a bundle has: graphs in graphs,
            functions, sparse tensors, or external tensors that are no initializers.
    """
    graphs = []
    for number, _, body in _fields(memoryview(data)):
        if number in (20, 25):
            raise ValueError("it has functions or training steps")
        if number == 7:
            graphs.append(body)
    parts = [(part, body) for graph in graphs for part, _, body in _fields(graph)]
    if any(part == 15 for part, _ in parts):
        raise ValueError("it has sparse tensors")
    for part, body in parts:
        if part == 1:
            _check_node(body)
    found = (_tensor(body) for part, body in parts if part == 5)
    tensors = [tensor for tensor in found if tensor is not None]
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("it has two tensors of one name")
    return OnnxFile(
        tuple(_port(body) for part, body in parts if part == 11),
        tuple(_port(body) for part, body in parts if part == 12),
        {tensor.name: tensor for tensor in tensors},
    )


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The fields of a message: each one's number, its value if it is a number, else its bytes."""
    at, nothing = 0, data[:0]
    while at < len(data):
        tag, at = _varint(data, at)
        value, body = 0, nothing
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at)
                body, at = data[at : at + size], at + size
            case 5:
                at += 4
            case _:
                raise ValueError("it is no ONNX file")
        if at > len(data):
            raise ValueError("it is cut off")
        yield tag >> 3, value, body


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise ValueError("it is no ONNX file")


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _check_node(node: memoryview) -> None:
    """Refuses a node that holds a graph, or a tensor in another file."""
    for number, _, attribute in _fields(node):
        if number != 5:
            continue
        for part, _, body in _fields(attribute):
            if part in (6, 11, 22, 23):
                raise ValueError("it has graphs or sparse tensors in its nodes")
            if part in (5, 10) and _tensor(body) is not None:
                raise ValueError("a node holds a tensor that is in another file")


def _tensor(data: memoryview) -> OnnxTensor | None:
    """A tensor if it is in another file."""
    name, kind, external = "", 0, False
    shape: list[int] = []
    entries: dict[str, str] = {}
    for number, value, body in _fields(data):
        match number:
            case 1:
                shape += _numbers(body) if body else [value]
            case 2:
                kind = value
            case 8:
                name = _text(body)
            case 13:
                entry = {part: _text(text) for part, _, text in _fields(body)}
                entries[entry.get(1, "")] = entry.get(2, "")
                external = True
            case 14:
                external |= value == 1
    return _external(name, kind, shape, entries) if external else None


def _external(name: str, kind: int, shape: list[int], entries: dict[str, str]) -> OnnxTensor:
    if kind not in DTYPES or any(size > LARGEST for size in shape):
        raise ValueError(f"tensor '{name}' has a shape or data type that can't be")
    dtype, width = DTYPES[kind]
    # The format lets both be left out: then the file's beginning, and the tensor's own length.
    own = width * math.prod(shape)
    offset, length = _bytes(name, entries, "offset", 0), _bytes(name, entries, "length", own)
    if length != own:
        raise ValueError(f"tensor '{name}' has {own} bytes and length {length}")
    return OnnxTensor(name, dtype, tuple(shape), entries.get("location", ""), offset, own)


def _bytes(name: str, entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if key in entries and not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"tensor '{name}' has {key} {text!r}")
    return int(text)


def _numbers(packed: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        numbers.append(value)
    return numbers


def _port(data: memoryview) -> OnnxPort:
    name, kind = "", 0
    shape: list[int | str] = []
    for number, _, body in _fields(data):
        if number == 1:
            name = _text(body)
        elif number == 2:
            for _, _, tensor in _only(body, 1):
                for part, value, inside in _fields(tensor):
                    if part == 1:
                        kind = value
                    elif part == 2:
                        shape += [_dimension(each) for _, _, each in _only(inside, 1)]
    return OnnxPort(name, DTYPES.get(kind, (str(kind), 0))[0], tuple(shape))


def _only(data: memoryview, wanted: int) -> Iterator[tuple[int, int, memoryview]]:
    return (field for field in _fields(data) if field[0] == wanted)


def _dimension(data: memoryview) -> int | str:
    found: int | str = ""
    for number, value, body in _fields(data):
        if number == 1:
            found = value
        elif number == 2:
            found = _text(body)
    return found
