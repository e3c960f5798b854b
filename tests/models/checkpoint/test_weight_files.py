"""Directories with several sets of weights, as they are found: the ones of `from_pretrained`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint
from tolerances import REFERENCE_FP32

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.verify.reference import TransformersReference

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "shards": {"shards": 2},
    "bin": {"format": "bin"},
    "bin-shards": {"format": "bin", "shards": 2},
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other weights in every layout."""
    root = tmp_path_factory.mktemp("layouts")
    return {
        name: make_checkpoint("llama-gqa", root / name, seed=number, **layout)
        for number, (name, layout) in enumerate(LAYOUTS.items())
    }


def merge(directory: Path, *others: Path) -> Path:
    """A directory that has the files of all."""
    for other in others:
        shutil.copytree(other, directory, dirs_exist_ok=True)
    return directory


def assert_as_transformers(directory: Path) -> None:
    """Ours, and the reference that builds are verified with, read what `from_pretrained` reads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    checkpoint = Checkpoint(directory)
    sources = {
        **checkpoint.family.ends(checkpoint.config, checkpoint.spec),
        **checkpoint.family.block(checkpoint.config, checkpoint.spec, 2),
    }
    for name, stored in (
        ("token_embedding", "model.embed_tokens.weight"),
        ("final_norm.weight", "model.norm.weight"),
        ("attention.norm.weight", "model.layers.2.input_layernorm.weight"),
    ):
        np.testing.assert_array_equal(checkpoint.read(sources[name]), expected[stored])
    ids = np.arange(6)[None]
    logits = TransformersReference(directory).forward(ids, lambda *_: None)
    with torch.inference_mode():
        whole = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits, whole, rtol=0, atol=REFERENCE_FP32)


@pytest.mark.parametrize("pair", list(itertools.combinations(LAYOUTS, 2)), ids="-and-".join)
def test_two_sets_of_weights(
    layouts: dict[str, Path], pair: tuple[str, str], tmp_path: Path
) -> None:
    for number, names in enumerate((pair, pair[::-1])):  # whichever is the newer one
        directory = tmp_path / str(number)
        assert_as_transformers(merge(directory, *(layouts[name] for name in names)))


def test_index_whose_shards_are_gone(layouts: dict[str, Path], tmp_path: Path) -> None:
    directory = merge(tmp_path / "checkpoint", layouts["shards"], layouts["whole"])
    for shard in directory.glob("model-*.safetensors"):
        shard.unlink()
    assert_as_transformers(directory)
    (directory / "model.safetensors").unlink()
    merge(directory, layouts["bin"])
    with pytest.raises(OSError, match="safetensors"):  # neither takes the .bin beside the index
        transformers.AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(
        CheckpointError, match=r"shard .* is missing, but model\.safetensors\.index"
    ):
        Checkpoint(directory)


def test_tensors_that_the_index_does_not_name(layouts: dict[str, Path], tmp_path: Path) -> None:
    directory = merge(tmp_path / "checkpoint", layouts["shards"])
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    first, last = sorted(directory.glob("model-*.safetensors"))
    for shard in (first, last):  # one tensor in both: the last one's is taken
        changed = load_file(shard) | {"model.norm.weight": torch.full((64,), 1.5 + (shard == last))}
        save_file(changed, shard, metadata={"format": "pt"})
    assert_as_transformers(directory)
