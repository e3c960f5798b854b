"""What compressed-tensors compresses, against its own decompression; where it is installed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ojfa_export.models.checkpoint.quantised import read_layout
from ojfa_export.models.checkpoint.quantised.layout import MatrixTensors
from ojfa_export.models.families.config import Config

OUTPUTS, INPUTS = 48, 128
# By the scales' strategy, beside its other arguments: their shape.
STRATEGIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "group": ({"group_size": 32}, (OUTPUTS, INPUTS // 32)),
    "channel": ({}, (OUTPUTS, 1)),
    "tensor": ({}, (1,)),
    "block": ({"block_structure": [32, 64]}, (2, 2)),
}
INTEGERS = itertools.chain(
    itertools.product(["pack-quantized"], [2, 3, 4, 8], [True, False], ["group", "channel"]),
    itertools.product(["int-quantized"], [8], [True, False], ["group", "channel", "tensor"]),
)
FLOATS = itertools.product(["float-quantized"], [8], [True], ["channel", "tensor", "block"])


def compress(
    rng: np.random.Generator, form: str, bits: int, symmetric: bool, strategy: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """A quantization_config, the tensors of a random layer, and its weights as decompressed."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    more, shape = STRATEGIES[strategy]
    kind = "float" if form.startswith("float") else "int"
    weights = QuantizationArgs(
        num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **more
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    largest = 448 if kind == "float" else (1 << bits - 1) - 0.5
    state = {
        "weight": torch.from_numpy(rng.normal(size=(OUTPUTS, INPUTS)).astype(np.float32)),
        "weight_scale": torch.from_numpy(rng.uniform(3, 6, shape).astype(np.float32) / largest),
    }
    if not symmetric:
        half = 1 << bits - 1
        points = rng.integers(-half, half, shape).astype(np.int8)
        state["weight_zero_point"] = torch.from_numpy(points)
    compressor = BaseCompressor.get_value_from_registry(form)
    compressed = compressor.compress(state, scheme)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, quantization_status="compressed"
    )
    fields = {**json.loads(config.model_dump_json()), "quant_method": "compressed-tensors"}
    return fields, compressed, compressor.decompress(compressed, scheme)["weight"]


@pytest.mark.parametrize(("form", "bits", "symmetric", "strategy"), [*INTEGERS, *FLOATS])
def test_the_same_weights(
    form: str, bits: int, symmetric: bool, strategy: str,
    rng: np.random.Generator, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("compressed_tensors")
    fields, compressed, expected = compress(rng, form, bits, symmetric, strategy)
    layout = read_layout(Config({"quantization_config": fields}, "config.json"))
    assert layout is not None
    path = tmp_path / "model.safetensors"
    named = {f"layer.{end}": each.contiguous() for end, each in compressed.items()}
    save_file(named, path)
    tensors = MatrixTensors("layer", dict.fromkeys(named, path), tmp_path)
    weights = layout.read(tensors, INPUTS, OUTPUTS).dequantised()
    np.testing.assert_array_equal(weights, expected.float().numpy())
