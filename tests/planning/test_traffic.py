"""Bytes of a decode step against the bytes that the export really wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chain import build_chain
from tiny_models import make_checkpoint

from bench.cpu.compiled import compile_checkpoint
from ojfa_export.bundle.names import block_name
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.planning.bandwidth import read_bandwidth
from ojfa_export.planning.machine import describe_machine
from ojfa_export.planning.traffic import (
    block_bytes,
    cache_bytes,
    decode_bytes,
    folded_head_bytes,
    head_bytes,
)

# Weight files align every tensor to 64 bytes.
PADDING = 64 * 12


@pytest.mark.parametrize("variant", ["llama-gqa", "qwen3", "phi3"])
def test_bytes_are_those_of_the_weight_files(variant: str, tmp_path: Path):
    make_checkpoint(variant, tmp_path / "checkpoint", seed=1)
    compiled = compile_checkpoint(tmp_path / "checkpoint", tmp_path, 32)
    spec = compiled.spec

    def size(name: str) -> int:
        return (compiled.weights / f"{name}.bin").stat().st_size

    assert abs(size(block_name(0)) - block_bytes(spec)) < PADDING
    assert abs(size("final_head") - head_bytes(spec)) < PADDING
    assert abs(size("exit_head") - folded_head_bytes(spec, 1)) < PADDING


@pytest.mark.parametrize("fields", [{"storage": "int4", "offsets": True}, {"storage": "int8"}])
def test_bytes_of_quantised_weight_files(fields: dict[str, Any], tmp_path: Path):
    weights = WeightFormat(group_size=32, zero_points=True, **fields)
    chain = build_chain(
        make_checkpoint("llama-gqa", tmp_path / "checkpoint", seed=1),
        tmp_path,
        weights=weights,
        rank=32,
    )

    def size(name: str) -> int:
        return (chain.graphs / f"{name}.bin").stat().st_size

    # Rows of zero points are filled up to whole bytes.
    padding = 2 * PADDING
    assert abs(size(block_name(0)) - block_bytes(chain.spec, weights)) < padding
    assert abs(size("final_head") - head_bytes(chain.spec, weights)) < padding
    assert abs(size("exit_head") - folded_head_bytes(chain.spec, 32, weights)) < padding
    assert folded_head_bytes(chain.spec, 8, weights) == folded_head_bytes(chain.spec, 8)


def test_a_step_is_blocks_with_their_caches_and_one_head(tmp_path: Path):
    make_checkpoint("smollm3-sliding-window", tmp_path / "checkpoint", seed=1)
    spec = compile_checkpoint(tmp_path / "checkpoint", tmp_path, 32).spec
    exit_head = folded_head_bytes(spec, 3)
    per_block = decode_bytes(spec, 2, 5, exit_head) - decode_bytes(spec, 1, 5, exit_head)
    assert per_block == block_bytes(spec) + cache_bytes(spec, 1, 5)
    full, before = (decode_bytes(spec, spec.blocks - n, 5, exit_head) for n in (0, 1))
    assert full - before == per_block + head_bytes(spec) - exit_head
    assert spec.window == 8
    assert cache_bytes(spec, 3, 100) == cache_bytes(spec, 3, 8) == 8 * cache_bytes(spec, 3, 1)
    assert cache_bytes(spec, 2, 100) == 100 * cache_bytes(spec, 3, 1)
    assert cache_bytes(spec, 3, 1) == 4 * 2 * spec.kv_heads * spec.head_dim


def test_machine_and_bandwidth_are_described():
    machine = describe_machine(("numpy", "no-such-package"))
    assert machine["cores"] >= 1
    assert machine["cpu"]
    assert "numpy" in machine["versions"]
    assert "no-such-package" not in machine["versions"]
    assert read_bandwidth(buffer_bytes=1 << 20, repeats=2) > 0
