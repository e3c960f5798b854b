"""`bench.cpu.weights`: a contestant that works in turns."""

from __future__ import annotations

import io
import json
import sys

import pytest
from vectors.cases import DIRECTORY

from bench.cpu import weights


def test_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Each answers with its times and what the process holds."""
    small = {"PAST": 9, "BURST": 3, "WARMUP": 1, "CAPACITY": 24, "TOKENS": range(3, 30)}
    for name, value in small.items():
        monkeypatch.setattr(weights, name, value)
    monkeypatch.setattr(sys, "stdin", io.StringIO("turn\nturn\n"))
    weights.main([str(DIRECTORY / "llama.ojfa"), "none", "--work", "ojfa-export"])
    ready, *turns = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == {}
    assert len(turns) == 2
    assert all(turn["ms_per_token"] > 0 < turn["prompt_ms"] for turn in turns)
    assert all(10 < turn["memory_mb"] < 4000 for turn in turns)
