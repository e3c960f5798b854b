"""The file that a benchmark of serving writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.commit import commit
from ojfa_export.planning.machine import describe_machine
from ojfa_export.runtime.model import Model


def write_result(
    path: Path | None, model: Model, figures: Mapping[str, Any], samples: Mapping[str, Any]
) -> None:
    """Prints the figures; writes them with machine, versions, commit and samples, if asked to.

    Args:
        path: A JSON file; None for none.
        model: That was measured.
        figures: By name.
        samples: What they were made of.
    """
    for name, value in figures.items():
        print(f"{name:72} {value:.2f}" if isinstance(value, float) else f"{name:72} {value}")
    if path is None:
        return
    document = {
        "machine": describe_machine(),
        "commit": commit(),
        "bundle": model.manifest.model.name,
        "figures": figures,
        **samples,
    }
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
