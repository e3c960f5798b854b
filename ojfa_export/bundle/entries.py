"""Parts of the manifest that say where things are: files, tensors in them, graphs, engines."""

from __future__ import annotations

from ojfa_export.bundle.part import NonNegativeInt, Part, PositiveInt, Sha256


class FileEntry(Part):
    """One file of the bundle."""

    size: NonNegativeInt
    sha256: str = Sha256


class TensorSlice(Part):
    """A tensor inside a file: little-endian float32, where nothing else is said."""

    file: str
    offset: NonNegativeInt
    shape: tuple[PositiveInt, ...]


class RotaryTables(Part):
    """Cosines and sines [positions, rotary_dim/2]; LongRoPE's second set follows the first."""

    cos: TensorSlice
    sin: TensorSlice


class Port(Part):
    """An input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphEntry(Part):
    """A portable ONNX graph.

    Attributes:
        weights: Files with the tensors that it refers to.
    """

    name: str
    file: str
    description: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: tuple[str, ...]


class EngineSet(Part):
    """The engines of one backend: a file for each graph."""

    backend: str
    files: dict[str, str]
    built_with: dict[str, str]
