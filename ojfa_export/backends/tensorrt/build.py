"""Building engines for the GPU at hand, from a bundle's portable graphs."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.tensorrt import api
from ojfa_export.backends.tensorrt.graphs import parts, transposed
from ojfa_export.backends.tensorrt.kernels import compile_kernels
from ojfa_export.backends.tensorrt.plan import PROFILES, GraphPlan, Weight
from ojfa_export.backends.tensorrt.sources import definitions
from ojfa_export.families.spec import ModelSpec, Precision
from ojfa_export.graphs.weights import references


def build_engine(spec: ModelSpec, graph: Path, plan: Path) -> None:
    """Builds what one portable graph needs that isn't there yet, and writes its plan.

    Equal blocks share their engines, which are built with the first of them. Files appear by
    rename, so that one that is there is whole.

    Args:
        spec: The model.
        graph: The portable graph.
        plan: The plan to write; engines are beside it.

    Raises:
        BackendError: TensorRT can't build it.
    """
    refs = references(onnx.load(graph, load_external_data=False))
    half = any(ref.dtype == onnx.TensorProto.FLOAT16 for ref in refs.values())
    precision: Precision = "fp16" if half else "fp32"
    models = parts(graph.stem, spec, refs, precision)
    for name, model in models.items():
        _build(name, model, plan.with_name(f"{name}.engine"), half=half)
    kernels = _kernels(spec, plan.parent, half=half) if graph.stem == "embed" else {}
    described = GraphPlan(
        precision=precision,
        engines={name.split(".")[-1]: f"{name}.engine" for name in models},
        kernels=kernels,
        weights={
            name: Weight(
                file=ref.location,
                offset=ref.offset,
                shape=ref.dims,
                precision="fp16" if ref.dtype == onnx.TensorProto.FLOAT16 else "fp32",
                transposed=transposed(name),
            )
            for name, ref in refs.items()
        },
    )
    _write(plan, described.model_dump_json(indent=2).encode())


def _build(name: str, model: onnx.ModelProto, file: Path, *, half: bool) -> None:
    if file.exists():
        return
    timing_cache = cache_directory() / f"tensorrt-{api.version()}.timing"
    shapes = _shapes(model)
    profiles = [
        {
            tensor: _range(shape, tokens)
            for tensor, shape in shapes.items()
            if any(isinstance(dim, str) for dim in shape)
        }
        for tokens in PROFILES
    ]
    engine = api.build(
        name, model.SerializeToString(), profiles, half=half, timing_cache=timing_cache
    )
    _write(file, engine)


def cache_directory() -> Path:
    """Where measured times are kept from one build to the next; nothing that is run."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(home) / "ojfa-export"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(
            dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
    }


def _range(
    shape: tuple[int | str, ...], tokens: tuple[int, int, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, best, most = (
        tuple(count if isinstance(dim, str) else dim for dim in shape) for count in tokens
    )
    return least, best, most


def _kernels(spec: ModelSpec, directory: Path, *, half: bool) -> dict[Precision, str]:
    """Compiles the kernels; the exit head's projection is fp32 in an fp16 bundle as well."""
    files: dict[Precision, str] = {}
    kinds: tuple[Precision, ...] = ("fp16", "fp32") if half else ("fp32",)
    for kind in kinds:
        macros = definitions(spec, half=kind == "fp16")
        files[kind] = f"kernels.{kind}.cubin"
        _write(directory / files[kind], compile_kernels(macros, the_device().compute_capability))
    return files


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.rename(path)
