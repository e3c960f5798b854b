"""What the check of one exit costs: the heads of all kinds, as graphs, timed in turns."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from ojfa_export.backends.onnxruntime.engines import head_inputs
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.graphs.export import ExitHead, Exporter
from ojfa_export.graphs.graph import FLOAT, Graph
from ojfa_export.graphs.weights import WeightFile, references
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
    graphs = {
        WHOLE: exporter.directory / "final_head.onnx",
        LINEAR: _export_linear(exporter, scratch / "linear"),
        **{
            name: _export(exporter, head, scratch / f"head_{index}")
            for index, (name, head) in enumerate(heads.items())
        },
    }
    sessions = {
        name: open_session(path.read_bytes(), name, path.parent) for name, path in graphs.items()
    }
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, exporter.checkpoint.spec.hidden_size)).astype(np.float32)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(WARM_ROUNDS + ROUNDS):
        for name, session in sessions.items():
            inputs = head_inputs(session, hidden, 1)
            start = time.perf_counter()
            for _ in range(BURST):
                session.run(None, inputs)
            if turn >= WARM_ROUNDS:
                samples[name].append((time.perf_counter() - start) * 1e3 / BURST)
    return {name: _cost(name, path, samples[name]) for name, path in graphs.items()}


def _copy(exporter: Exporter, directory: Path) -> Exporter:
    """An exporter into a folder of its own, with links to the weights that heads share."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in ("embed", "final_head"):
        for path in exporter.directory.glob(f"{name}.*"):
            (directory / path.name).hardlink_to(path)
    return Exporter(exporter.checkpoint, directory, exporter.precision, exporter.max_length)


def _export(exporter: Exporter, head: ExitHead, directory: Path) -> Path:
    """Exports an exit head; the graph's file."""
    _copy(exporter, directory).exit_head(head)
    return directory / "exit_head.onnx"


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


def _cost(name: str, graph: Path, samples: list[float]) -> HeadCost:
    refs = references(onnx.load(graph, load_external_data=False)).values()
    return HeadCost(
        name=name,
        weights_read=sum(math.prod(ref.dims) for ref in refs),
        bytes_read=sum(ref.length for ref in refs),
        milliseconds=statistics.median(samples),
        samples_ms=samples,
    )
