"""What `AutoTokenizer`, `from_pretrained` and `generate` find that the compiler got wrong."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_checks import AS_USERS
from tiny_models import make_checkpoint
from tokenizers import Tokenizer

from ojfa_export.compiler import inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.errors import CheckpointError, VerificationError
from ojfa_export.models import tokenizer
from ojfa_export.models.checkpoint import checkpoint as checkpoints
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT
from ojfa_export.verify import as_users
from ojfa_export.verify import reference as references
from ojfa_export.verify.probes import LONG, PLANES, probe_texts
from ojfa_export.verify.verify import verify_bundle

Build = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """With a token that tokenizer.json lacks, saved truncation, and words on generation."""
    directory = make_checkpoint("llama-gqa", tmp_path / "checkpoint", seed=8)
    saved = Tokenizer.from_file(str(directory / "tokenizer.json"))
    saved.enable_truncation(30)
    saved.save(str(directory / "tokenizer.json"))
    token = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False}
    added = {"310": {**token, "single_word": False, "special": True}}
    _write(directory / "tokenizer_config.json", {"added_tokens_decoder": added})
    said = {"repetition_penalty": 1.2, "suppress_tokens": [4, 9], "top_k": 9, "do_sample": True}
    _write(directory / "generation_config.json", said)
    return directory


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields))


@pytest.fixture
def make(checkpoint: Path, calibration_text: Path, tmp_path: Path) -> Build:
    def call(**changes: Any) -> Path:
        options = BuildOptions(
            str(checkpoint), tmp_path / "out.ojfa", rank=8, shortcut="ojfa", max_cache_length=64,
            calibration_data=(calibration_text,), calibration_tokens=1024,
        )  # fmt: skip
        return build(replace(options, **changes)).bundle

    return call


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_build_and_verify_go_the_users_way(make: Build, checkpoint: Path, precision: str) -> None:
    bundle = make(precision=precision)
    reported = json.loads((bundle / "report" / "report.json").read_text())["checks"]
    checks = verify_bundle(bundle, str(checkpoint), "onnxruntime", SILENT)
    for names in ({check["name"] for check in reported}, {check.name for check in checks}):
        assert names >= AS_USERS
    assert all(check.passed for check in checks)


def test_one_whole_model_is_in_memory_at_a_time(
    make: Build, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the bundle's model begins to generate, transformers' is gone."""
    bundle, real, alive = make(skip_verification=True), Model.generate, []

    def generate(self: Model, *arguments: Any, **options: Any) -> Any:
        models = [each for each in gc.get_objects() if type(each) is transformers.LlamaForCausalLM]
        weights = [each for model in models for each in model.parameters()]
        alive.append(sum(each.nbytes for each in weights if each.device.type != "meta"))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Model, "generate", generate)
    checks = verify_bundle(bundle, str(checkpoint), "onnxruntime", SILENT)
    assert "generate" in {check.name for check in checks}
    assert alive
    assert not any(alive)


def test_generation_that_differs_from_the_checkpoints(make: Build, checkpoint: Path) -> None:
    bundle = make(skip_verification=True)
    path = checkpoint / "generation_config.json"
    _write(path, {**json.loads(path.read_text()), "eos_token_id": [0]})
    checks = verify_bundle(bundle, str(checkpoint), "onnxruntime", SILENT)
    assert all(check.passed for check in checks)
    _write(path, {"repetition_penalty": 1.9, "suppress_tokens": [4, 9], "top_k": 9, "top_p": 0.5})
    checks = verify_bundle(bundle, str(checkpoint), "onnxruntime", SILENT)
    failed = {check.name: check.max_abs_diff for check in checks if not check.passed}
    assert failed["generation: defaults"] == 2
    assert failed.keys() <= {"generation: defaults", "generate"}


def test_what_was_ignored_is_not_compared(make: Build, checkpoint: Path) -> None:
    said = {"num_beams": 3, "no_repeat_ngram_size": 1, "temperature": 0.5, "brand_new": 1}
    _write(checkpoint / "generation_config.json", said)
    bundle = make(ignore_config_fields=(*said,))
    checks = verify_bundle(bundle, str(checkpoint), "onnxruntime", SILENT)
    assert all(check.passed for check in checks)


def test_tokenizer_that_overlooks_a_token(make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(directory: Path) -> Tokenizer:
        return tokenizer.parse((directory / "tokenizer.json").read_bytes())

    monkeypatch.setattr(inputs, "read_tokenizer", alone)
    with pytest.raises(VerificationError, match="the first: tokenizer: added tokens") as caught:
        make()
    assert "AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained" in str(caught.value.hint)


def test_files_that_transformers_does_not_take(
    make: Build, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler whose choice the streamed reference shares: all other checks pass."""
    stale = make_checkpoint("llama-gqa", tmp_path / "stale", seed=9, shards=2)
    shutil.copytree(stale, checkpoint, dirs_exist_ok=True)
    (checkpoint / "generation_config.json").write_text("{}")

    def indexed(directory: Path) -> dict[str, Path]:
        shards = sorted(directory.glob("model-*.safetensors"))
        return {name: shard for shard in shards for name in load_file(shard)}

    def streamed(self: Any, directory: Path) -> None:
        self._files = indexed(directory)

    monkeypatch.setattr(checkpoints, "find_tensors", indexed)
    monkeypatch.setattr(references._WeightFiles, "__init__", streamed)
    with pytest.raises(VerificationError, match=r"1 of .* checks failed .*: generate differs"):
        make()


def test_lm_head_that_was_tied(checkpoint: Path, make: Build, monkeypatch: Any) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.3 * torch.randn(320, 64)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    _write(checkpoint / "config.json", config | {"tie_word_embeddings": True})
    make(overwrite=True)
    monkeypatch.setattr(checkpoints.Checkpoint, "_is_tied", lambda *_: True)
    with pytest.raises(VerificationError):
        make(overwrite=True)


def test_model_larger_than_memory(
    make: Build, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(as_users, "read_meminfo", lambda: {"MemAvailable": 1000})
    checks = verify_bundle(make(), str(checkpoint), "onnxruntime", SILENT)
    assert checks[-1].name == "generate: left out, it may take 0.0 GiB"


def test_tokenizer_that_transformers_cannot_open(make: Build, checkpoint: Path) -> None:
    bundle = make(skip_verification=True)
    (checkpoint / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="transformers can't open the tokenizer of") as caught:
        verify_bundle(bundle, str(checkpoint), "onnxruntime", SILENT)
    assert caught.value.hint


@pytest.mark.parametrize("truncation", [0, 7, 900])
def test_probes(truncation: int) -> None:
    texts = probe_texts(["<b>", "<a>", "<a>"], truncation)
    every = "".join(text for each in texts.values() for text in each)
    assert {ord(character) >> 16 for character in every} == set(range(PLANES))
    assert all(space in every for space in " \t\n\r\u00a0")
    assert {"<a>", "<b>", "x<a>".replace("x", "a") + "b"} <= set(texts["added tokens"])
    [long] = texts["a long text"]
    assert len(long) >= max(LONG, 80 * truncation)
    every.encode()  # no half of a surrogate pair
    assert np.unique([len(text) for text in texts["Unicode"]]).min() > 0
