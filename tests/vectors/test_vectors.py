"""The Python runtime against the vectors that the C++ runtime is tested with too."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tolerances import CONFIDENCE_OF_VECTORS, LOGITS_FP32
from vectors.cases import BUNDLES, DIRECTORY, open_bundle, run_generation, run_steps


def stored(name: str, kind: str) -> list[dict[str, Any]]:
    return json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))[kind]


def assert_same(actual: Any, expected: Any, tolerance: float, where: str) -> None:
    """Numbers with a fraction within a tolerance, all else equal."""
    if isinstance(expected, float) and isinstance(actual, float):
        assert math.isclose(actual, expected, rel_tol=0, abs_tol=tolerance), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            # Sums over some tens of tokens.
            loose = 50 * tolerance if key == "confidence_sums" else tolerance
            assert_same(actual[key], value, loose, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_same(mine, theirs, tolerance, f"{where}[{index}]")
    else:
        assert actual == expected, where


@pytest.mark.parametrize("name", BUNDLES)
def test_generations(name):
    model, cases = open_bundle(name), stored(name, "generations")
    assert cases
    for case in cases:
        actual = run_generation(model, case)
        assert_same(actual, case["gives"], CONFIDENCE_OF_VECTORS, case["name"])


@pytest.mark.parametrize("name", BUNDLES)
def test_sessions(name):
    model, cases = open_bundle(name), stored(name, "sessions")
    assert cases
    for case in cases:
        assert_same(run_steps(model, case), case["gives"], LOGITS_FP32, case["name"])
