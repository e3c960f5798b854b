"""What the check of one exit costs: the heads of all kinds, as graphs, timed in turns."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ojfa_export.backends.onnxruntime.engines import head_inputs
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.names import EXIT_BLOCK, exit_block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.graphs.export import ExitHead, Exporter
from ojfa_export.graphs.graph import FLOAT, Graph
from ojfa_export.graphs.weights import WeightFile, references
from ojfa_export.models.spec import ModelSpec
from ojfa_export.shortcuts.comparison.model import HeadCost
from ojfa_export.shortcuts.kinds import Kind

FOLDED, RESIDUAL, WHOLE, LINEAR = "folded", "residual", "model's own", "linear map"
HEADS: Mapping[Kind, str] = {
    "identity": WHOLE,
    "jtc": LINEAR,
    "njtc": FOLDED,
    "n-njtc": FOLDED,
    "ojfa": FOLDED,
    "ojfa-cosine": FOLDED,
    "mixed": FOLDED,
    "residual-closed-form": RESIDUAL,
    "residual": RESIDUAL,
}
ROUNDS, WARM_ROUNDS, BURST = 60, 5, 4
# Tokens before the one that a block behind an exit runs.
PAST = 128


def measure_heads(
    exporter: Exporter, heads: Mapping[str, ExitHead], scratch: Path
) -> dict[str, HeadCost]:
    """Times each form of exit head on one token, in bursts that take turns.

    Args:
        exporter: Of the model; its final head has been exported.
        heads: By name: the folded and the residual one of the rank that is compared, and others.
        scratch: For the graphs.

    Returns:
        By the head's name: those of `HEADS`, and the others'.
    """
    spec = exporter.checkpoint.spec
    whole = exporter.directory / "final_head.onnx"
    graphs = {
        WHOLE: [whole],
        LINEAR: [_export_linear(exporter, scratch / "linear")],
        **{
            name: _export(exporter, head, scratch / f"head_{index}")
            for index, (name, head) in enumerate(heads.items())
        },
    }
    runs = {name: _opened(name, paths, spec) for name, paths in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(WARM_ROUNDS + ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(BURST):
                run()
            if turn >= WARM_ROUNDS:
                samples[name].append((time.perf_counter() - start) * 1e3 / BURST)
    return {name: _cost(name, paths, spec, samples[name]) for name, paths in graphs.items()}


def _opened(name: str, paths: list[Path], spec: ModelSpec) -> Callable[[], object]:
    """What runs a head's graphs on one token, one after the other."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, spec.hidden_size)).astype(np.float32)
    sessions = [open_session(path.read_bytes(), name, path.parent) for path in paths]
    inputs: list[dict[str, Any]] = [
        _block_inputs(session, hidden, spec)
        if path.stem.startswith(EXIT_BLOCK)
        else dict(head_inputs(session, hidden, 1))
        for session, path in zip(sessions, paths, strict=True)
    ]

    def run() -> None:
        for session, feeds in zip(sessions, inputs, strict=True):
            session.run(None, feeds)

    return run


def _block_inputs(session: Any, hidden: Float32, spec: ModelSpec) -> dict[str, Any]:
    """What a block behind an exit takes: one token, behind PAST others."""
    rng = np.random.default_rng(0)
    shapes = {
        "past_key": (1, spec.kv_heads, PAST, spec.head_dim),
        "past_value": (1, spec.kv_heads, PAST, spec.head_dim),
    }
    feeds: dict[str, Any] = {}
    for port in session.get_inputs():
        if port.name == "hidden":
            feeds[port.name] = hidden[None]
        elif "int" in port.type:
            feeds[port.name] = np.full((1, 1), PAST if port.name == "positions" else 0, np.int32)
        else:
            shape = shapes.get(port.name, (1, 1, spec.rotary_dim // 2))
            dtype = np.float16 if "float16" in port.type else np.float32
            feeds[port.name] = rng.normal(size=shape).astype(dtype)
    return feeds


def _copy(exporter: Exporter, directory: Path) -> Exporter:
    """An exporter into a folder of its own, with links to the weights that heads share."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in ("embed", "final_head"):
        for path in exporter.directory.glob(f"{name}.*"):
            (directory / path.name).hardlink_to(path)
    return Exporter(exporter.checkpoint, directory, exporter.precision, exporter.max_length)


def _export(exporter: Exporter, head: ExitHead, directory: Path) -> list[Path]:
    """Exports an exit head, or blocks behind exits; the files of the graphs that a check runs."""
    _copy(exporter, directory).shortcut(head)
    if isinstance(head, BlockShortcut):
        return [directory / f"{name}.onnx" for name in (exit_block_name(0), "final_head")]
    return [directory / "exit_head.onnx"]


def _export_linear(exporter: Exporter, directory: Path) -> Path:
    """Exports JTC's head: a linear map, then final norm and LM head; the graph's file.

    What the map holds makes no difference to its cost.
    """
    copy, spec, dialect = _copy(exporter, directory), exporter.checkpoint.spec, exporter.dialect
    weights = references(onnx.load(directory / "final_head.onnx", load_external_data=False))
    with WeightFile(directory, "linear_head.bin", copy.precision) as file:
        matrix = file.add("matrix", np.eye(spec.hidden_size, dtype=np.float32))
    graph = Graph("linear_head", "A linear map, final norm and LM head")
    hidden = graph.input("hidden", FLOAT, "rows", spec.hidden_size)
    mapped = dialect.linear(graph, dialect.to_compute(graph, hidden), {"map.weight": matrix}, "map")
    normed = dialect.norm(graph, mapped, weights, "final_norm")
    logits = dialect.vocabulary(graph, normed, weights, "head")
    graph.output(logits, "logits", FLOAT, "rows", spec.vocab_size)
    path = directory / "linear_head.onnx"
    path.write_bytes(graph.model().SerializeToString())
    return path


def _cost(name: str, graphs: list[Path], spec: ModelSpec, samples: list[float]) -> HeadCost:
    """Weights; of a block behind an exit its keys and values as well, in fp32."""
    loaded = [references(onnx.load(graph, load_external_data=False)) for graph in graphs]
    refs = [ref for each in loaded for ref in each.values()]
    past = [graph for graph in graphs if graph.stem.startswith(EXIT_BLOCK)]
    cached = len(past) * 2 * PAST * spec.kv_heads * spec.head_dim
    return HeadCost(
        name=name,
        weights_read=sum(math.prod(ref.dims) for ref in refs) + cached,
        bytes_read=sum(ref.length for ref in refs) + 4 * cached,
        milliseconds=statistics.median(samples),
        samples_ms=samples,
    )
