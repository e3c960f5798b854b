"""What the backend keeps for each graph: which graph file it runs, and where its weights are."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from ojfa_export.errors import BundleError
from ojfa_export.families.spec import Precision


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weight(_Part):
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


class GraphPlan(_Part):
    """One graph.

    Attributes:
        precision: Of matrix products and of the cache.
        graph: An ONNX file in this file's directory; equal blocks share theirs.
        weights: By the graph's inputs.
    """

    precision: Precision
    graph: str
    weights: dict[str, Weight]


def read_plan(path: Path) -> GraphPlan:
    """Reads a graph's plan.

    Raises:
        BundleError: It is damaged, or names files elsewhere.
    """
    try:
        plan = GraphPlan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError) as error:
        raise BundleError(
            f"{path} can't be read: {str(error).splitlines()[0]}",
            hint="rebuild the engines with 'ojfa-export build BUNDLE --backend onnxruntime-cuda'",
        ) from error
    for name in (plan.graph, *(weight.file for weight in plan.weights.values())):
        if Path(name).name != name:
            raise BundleError(f"{path} names a file elsewhere: {name!r}", hint="don't use it")
    return plan
