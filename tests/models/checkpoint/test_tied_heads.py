"""Token embedding and LM head, tied in config.json and stored otherwise: as `from_pretrained`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint

from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.verify import verify_bundle

EMBEDDINGS = {
    "llama-tied": "model.embed_tokens.weight",
    "granite-tied": "model.embed_tokens.weight",
    "phi3-tied": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "gpt2-hub-keys": "wte.weight",
}
HEAD = "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def change(directory: Path, name: str, edit: Callable[[Tensors, str], None]) -> Path:
    path = make_checkpoint(name, directory, seed=3) / "model.safetensors"
    tensors = load_file(path)
    edit(tensors, EMBEDDINGS[name])
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def same(tensors: Tensors, embedding: str) -> None:
    tensors[HEAD] = tensors[embedding].clone()


def other(tensors: Tensors, embedding: str) -> None:
    tensors[HEAD] = tensors[embedding].clone()
    tensors[HEAD][-1, -1] += 0.5


def alone(tensors: Tensors, embedding: str) -> None:
    tensors[HEAD] = tensors.pop(embedding)


@pytest.mark.parametrize("edit", [same, other, alone], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_head_beside_a_tied_embedding(
    tmp_path: Path, name: str, edit: Callable[[Tensors, str], None]
) -> None:
    directory = change(tmp_path, name, edit)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    checkpoint = Checkpoint(directory)
    checkpoint.check_tensors()
    sources = checkpoint.family.ends(checkpoint.config, checkpoint.spec)
    modules = {
        "token_embedding": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }
    for end, module in modules.items():
        source = sources[end if end in sources else "token_embedding"]
        wanted = module.weight.detach().numpy() * np.float32(source.scale)
        np.testing.assert_array_equal(checkpoint.read(source), wanted)
    assert ("head" in sources) != checkpoint.spec.tied_head
    assert checkpoint.spec.tied_head == (edit is not other)


@pytest.mark.parametrize("edit", [other, alone], ids=lambda edit: edit.__name__)
def test_bundle_with_a_head_of_its_own(
    tmp_path: Path, calibration_text: Path, edit: Callable[[Tensors, str], None]
) -> None:
    directory = change(tmp_path / "checkpoint", "llama-tied", edit)
    options = BuildOptions(
        str(directory), tmp_path / "out.ojfa", rank=8, shortcut="ojfa", max_cache_length=64,
        calibration_data=(calibration_text,), calibration_tokens=1024, skip_verification=True,
    )  # fmt: skip
    bundle = build(options).bundle
    checks = verify_bundle(bundle, str(directory), "onnxruntime", SILENT)
    assert [check.name for check in checks if not check.passed] == []


@pytest.mark.parametrize("name", ["llama", "gpt2-untied"])
def test_missing_head_is_called_by_its_name(tmp_path: Path, name: str) -> None:
    path = make_checkpoint(name, tmp_path, seed=3) / "model.safetensors"
    tensors = load_file(path)
    del tensors[HEAD]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^tensor 'lm_head\.weight' is missing") as caught:
        Checkpoint(tmp_path).check_tensors()
    assert "tie_word_embeddings" in str(caught.value.hint)


def test_neither_is_there(tmp_path: Path) -> None:
    directory = change(tmp_path, "llama-tied", lambda tensors, name: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is missing"):
        Checkpoint(directory).check_tensors()
