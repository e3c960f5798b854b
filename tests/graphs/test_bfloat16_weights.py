"""Weights in bf16: as a checkpoint has them, or rounded once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_checkpoint

from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.weights import map_tensors, precision_of, references
from ojfa_export.models.checkpoint.checkpoint import Checkpoint

onnx = pytest.importorskip("onnx")


def exported(checkpoint, directory):
    """A block's weights as they are stored."""
    directory.mkdir()
    Exporter(Checkpoint(checkpoint), directory, "bf16", 32, None).block(1)
    model = onnx.load(directory / "block_01.onnx", load_external_data=False)
    assert precision_of(references(model).values()) == "bf16"
    return map_tensors(model, directory)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_weights_of_a_checkpoint(tmp_path, dtype):
    checkpoint = make_checkpoint("llama-gqa", tmp_path / "checkpoint", seed=5)
    path = checkpoint / "model.safetensors"
    # Beyond what fp16 holds, above and below.
    tensors = {name: (1e20 * each).astype(dtype) for name, each in load_file(path).items()}
    tensors["model.layers.1.mlp.down_proj.weight"] *= 0
    save_file(tensors, path, {"format": "pt"})
    stored = exported(checkpoint, tmp_path / "graphs")
    wanted = tensors["model.layers.1.self_attn.o_proj.weight"].T.astype(ml_dtypes.bfloat16)
    found = stored["attention.out.weight"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), wanted.view(np.uint16))
    assert stored["attention.norm.weight"].dtype == np.float32
