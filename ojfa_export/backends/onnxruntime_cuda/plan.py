"""What the backend keeps for each graph: which graph file it runs, and where its weights are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from ojfa_export.backends.cuda.plan import Part, read
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.models.precision import Precision

NAME = "onnxruntime-cuda"  # as in --backend


class Weight(Part):
    """A weight in a file of the bundle's graphs, little-endian.

    Attributes:
        stored: What it is in the file.
        used: What the graph takes.
    """

    file: str
    offset: NonNegativeInt
    shape: tuple[PositiveInt, ...]
    stored: Precision
    used: Precision


class GraphPlan(Part):
    """One graph.

    Attributes:
        precision: Of matrix products and of the cache.
        graph: An ONNX file in this file's directory; equal blocks share theirs.
        weights: By the graph's inputs.
    """

    precision: Precision
    graph: str
    weights: dict[str, Weight]


def read_plan(path: Path, files: Files = UNCHECKED) -> GraphPlan:
    """Reads a graph's plan.

    Raises:
        BundleError: It is damaged, or names files elsewhere.
    """
    return read(path, GraphPlan, _named, NAME, files)


def _named(plan: GraphPlan) -> Iterator[str]:
    yield plan.graph
    for weight in plan.weights.values():
        yield weight.file
