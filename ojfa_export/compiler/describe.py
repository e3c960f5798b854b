"""Describes built files for the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from ojfa_export.bundle.entries import FileEntry, GraphEntry, Port, RotaryTables, TensorSlice
from ojfa_export.bundle.names import GRAPHS, MANIFEST
from ojfa_export.graphs.weights import TensorRef, references
from ojfa_export.system.digest import sha256_file


def describe_some(bundle: Path, names: Iterable[str]) -> tuple[GraphEntry, ...]:
    """Describes portable graphs."""
    return tuple(_describe_graph(bundle, name) for name in names)


def _describe_graph(bundle: Path, name: str) -> GraphEntry:
    model = onnx.load(bundle / GRAPHS / f"{name}.onnx", load_external_data=False)
    return GraphEntry(
        name=name,
        file=f"{GRAPHS}/{name}.onnx",
        description=model.graph.doc_string,
        inputs=tuple(_port(value) for value in model.graph.input),
        outputs=tuple(_port(value) for value in model.graph.output),
        weights=tuple(sorted({f"{GRAPHS}/{ref.location}" for ref in references(model).values()})),
    )


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    return Port(
        name=value.name,
        dtype=onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim),
    )


def describe_rotary(bundle: Path) -> RotaryTables | None:
    """Where the tables of rotations are, or None for learned positions."""
    refs = references(onnx.load(bundle / GRAPHS / "embed.onnx", load_external_data=False))
    if "rotary_cos_table" not in refs:
        return None
    cos, sin = (describe_slice(refs[f"rotary_{name}_table"]) for name in ("cos", "sin"))
    return RotaryTables(cos=cos, sin=sin)


def describe_slice(ref: TensorRef) -> TensorSlice:
    """Where a tensor is."""
    return TensorSlice(file=f"{GRAPHS}/{ref.location}", offset=ref.offset, shape=ref.dims)


def describe_files(bundle: Path) -> dict[str, FileEntry]:
    """Size and digest of every file but the manifest."""
    return {
        path.relative_to(bundle).as_posix(): FileEntry(
            size=path.stat().st_size, sha256=sha256_file(path)
        )
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path != bundle / MANIFEST
    }
