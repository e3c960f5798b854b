"""Building engines for the GPU at hand, from a bundle's portable graphs.

Files are named by a digest of all that they depend on: graph, profiles, precision, settings,
TensorRT, GPU. One that is there is therefore the right one, and a build that was interrupted goes
on with what it had finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import onnx

from ojfa_export.backends.cuda.cublas import Cublas
from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.cuda.kernels import compile_kernels
from ojfa_export.backends.cuda.sources import definitions, sources_digest
from ojfa_export.backends.narrow_cache import CacheStorage
from ojfa_export.backends.tensorrt import algorithms, api
from ojfa_export.backends.tensorrt.graphs import parts, transposed
from ojfa_export.backends.tensorrt.parts import (
    check_fp8_cache,
    check_gpu,
    check_parts,
    check_rows,
)
from ojfa_export.backends.tensorrt.plan import (
    INTERFACE,
    PROFILES,
    GraphPlan,
    QuantisedWeight,
    StoredTensor,
    Weight,
    has_engines,
)
from ojfa_export.backends.tensorrt.tiled import matrix_shapes
from ojfa_export.bundle.names import DRAFT_GRAPHS
from ojfa_export.bundle.weight_format import ENDS, PACKED, WeightFormat
from ojfa_export.errors import BackendError
from ojfa_export.graphs.quantised import format_of
from ojfa_export.graphs.weights import PRECISIONS, TensorRef, precision_of, references
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.atomic import write_atomically

KERNELS = "kernels"
_, DRAFT_LAYER, _ = DRAFT_GRAPHS


def build_engine(
    spec: ModelSpec, graph: Path, plan: Path, cache: CacheStorage | None = None
) -> None:
    """Builds what one portable graph needs that isn't there yet, and writes its plan.

    Equal blocks share their engines, which are built with the first of them. Files appear by
    rename, so that one that is there is whole.

    Args:
        spec: The model; of a draft layer's graphs, the layer.
        graph: The portable graph.
        plan: The plan to write; engines are beside it.
        cache: What keys and values are kept in; None for the precision of products.

    Raises:
        BackendError: TensorRT can't build it, or there are no kernels of the model's parts, or for
            this GPU.
    """
    device = the_device()
    check_gpu(device.name, device.compute_capability)
    check_parts(spec)
    refs, precision, form = _references(graph)
    check_rows(spec, precision, form)
    if cache is not None:
        check_fp8_cache(spec, device.name, device.compute_capability)
    # By part: a name without what comes before it, "qkv" and "mlp" of a block.
    engines = {
        name.split(".")[-1]: _build(name, model, plan.parent, precision)
        for name, model in _engines(graph.stem, spec, refs, precision, form).items()
    }
    kernels = {
        kind: _kernels(
            plan.parent,
            definitions(spec, kind, form, fp8_cache=cache is not None and kind == precision),
            kind,
        )
        for kind in _kinds(graph.stem, precision)
    }
    described = GraphPlan(
        precision=precision,
        engines=engines,
        kernels=kernels,
        interface=INTERFACE,
        products=_products(spec, plan.parent, precision, form) if graph.stem == "embed" else None,
        weights={
            name: Weight(
                file=ref.location,
                offset=ref.offset,
                shape=ref.dims,
                precision=PRECISIONS[ref.dtype],
                transposed=transposed(name),
            )
            for name, ref in refs.items()
            if not name.endswith(ENDS)
        },
        form=form,
        cache=cache,
        quantised={
            name.removesuffix(PACKED): _quantised(name.removesuffix(PACKED), refs, spec)
            for name in refs
            if name.endswith(PACKED)
        },
        activation_bytes=max(
            (_activation_bytes(plan.with_name(file)) for file in engines.values()), default=0
        ),
    )
    write_atomically(plan, described.to_json())


def _kinds(graph: str, precision: Precision) -> tuple[Precision, ...]:
    """The precisions of matrices that a graph's plan names kernels for; few graphs' do."""
    if graph == DRAFT_LAYER:
        return (precision,)
    if graph != "embed":
        return ()
    # The exit head's projection is fp32 whatever the precision.
    return ("fp32",) if precision == "fp32" else (precision, "fp32")


def engine_names(spec: ModelSpec, graph: Path) -> list[str]:
    """What `build_engine` builds for a graph: names of engines, which equal blocks share."""
    if graph.stem == "embed":
        return [KERNELS]
    if graph.stem == DRAFT_LAYER:
        return [f"{KERNELS}.draft"]
    return list(_engines(graph.stem, spec, *_references(graph)))


def _engines(
    name: str,
    spec: ModelSpec,
    refs: dict[str, TensorRef],
    precision: Precision,
    form: WeightFormat | None,
) -> Mapping[str, onnx.ModelProto]:
    """The graphs of the engines that a portable graph needs, by name."""
    return parts(name, spec, refs, precision) if has_engines(precision, form) else {}


def _references(graph: Path) -> tuple[dict[str, TensorRef], Precision, WeightFormat | None]:
    """A graph's weights, the precision of its model's products, and its quantised format.

    Where matrices are quantised, the embedding says what all else is in.
    """
    refs = references(onnx.load(graph, load_external_data=False))
    form = _form(graph.parent, graph.with_name("embed.onnx").stat().st_mtime_ns)
    if form is None:
        return refs, precision_of(refs.values()), None
    embed = onnx.load(graph.with_name("embed.onnx"), load_external_data=False)
    return refs, precision_of(references(embed).values()), form


@lru_cache(maxsize=1)
def _form(graphs: Path, written: int) -> WeightFormat | None:
    """What the quantised matrices of a bundle's graphs are stored as; None where there are none.

    Args:
        graphs: Where they are.
        written: When the first of them was, so that others in their place are read again.
    """
    names = [*sorted(graphs.glob("block_*.onnx")), graphs / "final_head.onnx"]
    forms = (format_of(onnx.load(path, load_external_data=False)) for path in names)
    return next((form for form in forms if form is not None), None)


def _quantised(name: str, refs: dict[str, TensorRef], spec: ModelSpec) -> QuantisedWeight:
    """Where a quantised matrix is."""
    tensors = {
        end.removeprefix("."): StoredTensor(file=ref.location, offset=ref.offset, shape=ref.dims)
        for end in ENDS
        if (ref := refs.get(name + end)) is not None
    }
    return QuantisedWeight(**tensors, paired=spec.gated and name == "mlp.up.weight")


def _build(name: str, model: onnx.ModelProto, directory: Path, precision: Precision) -> str:
    """Builds an engine, unless it is there; the name of its file."""
    serialized = model.SerializeToString(deterministic=True)
    shapes = _shapes(model)
    profiles = [
        {
            tensor: _range(shape, tokens)
            for tensor, shape in shapes.items()
            if any(isinstance(dim, str) for dim in shape)
        }
        for tokens in PROFILES
    ]
    settings = {"profiles": profiles, "precision": precision, **api.settings()}
    file = directory / f"{name}-{_digest(serialized, settings)}.engine"
    if not file.exists():
        timing_cache = cache_directory() / f"tensorrt-{api.version()}.timing"
        engine = api.build(
            name, serialized, profiles, half=precision == "fp16", timing_cache=timing_cache
        )
        write_atomically(file, engine)
    return file.name


@cache
def _activation_bytes(engine: Path) -> int:
    """What an engine that was just built works in; its name says what it is."""
    return api.activation_bytes(api.deserialize(engine.stem, engine.read_bytes()))


def _digest(content: bytes, settings: Mapping[str, Any]) -> str:
    """Of what a file depends on; the GPU is part of it."""
    device = the_device()
    here = [device.name, device.compute_capability, settings]
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode())
    digest.update(content)
    return digest.hexdigest()[:16]


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


def _kernels(directory: Path, macros: dict[str, int], precision: Precision) -> str:
    """Compiles the kernels for matrices of a precision; the name of their file."""
    digest = _digest(sources_digest().encode(), {"macros": macros})
    path = directory / f"{KERNELS}.{precision}-{digest}.cubin"
    if not path.exists():
        write_atomically(path, compile_kernels(macros, the_device().compute_capability))
    return path.name


def _products(
    spec: ModelSpec, directory: Path, precision: Precision, form: WeightFormat | None
) -> str | None:
    """Measures how products of many tokens are made fastest; None where cuBLASLt isn't there.

    Raises:
        BackendError: It isn't there, and no engine would run them instead.
    """
    try:
        version = Cublas(the_device()).version
    except BackendError:
        if not has_engines(precision, form):
            raise
        return None
    depends = {"shapes": matrix_shapes(spec), "precision": precision, "cublas": version}
    path = directory / f"products-{_digest(b'', depends)}.json"
    if not path.exists():
        choices = algorithms.measure(the_device(), spec, precision)
        write_atomically(path, choices.model_dump_json(indent=1).encode())
    return path.name
