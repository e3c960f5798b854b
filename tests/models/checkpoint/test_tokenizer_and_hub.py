"""Tokenizers in newer and older files, and checkpoints named by hub ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ojfa_export.errors import CheckpointError, UsageError
from ojfa_export.models.checkpoint import hub
from ojfa_export.models.checkpoint.hub import resolve
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer

Fields = dict[str, Any]


def test_tokenizer_missing_or_damaged(directory: Path) -> None:
    path = directory / "tokenizer.json"
    assert read_tokenizer(directory).encode("def").ids
    for damage in (lambda: path.write_text("{}"), path.unlink):
        damage()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
            read_tokenizer(directory)
        assert str(directory) in caught.value.message
        assert caught.value.hint


def test_tokenizer_of_older_files_is_converted(directory: Path) -> None:
    tokenizer = read_tokenizer(directory)
    model = json.loads(tokenizer.to_str())["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "def parse(args):\n    return é"
    assert read_tokenizer(directory).encode(text).ids == tokenizer.encode(text).ids


def test_resolve_directory(directory: Path) -> None:
    assert resolve(str(directory)) == directory


@pytest.mark.parametrize("name", ["./none", "/none/none", "a/b/c", "~none/x"])
def test_path_that_is_no_directory(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not a directory") as caught:
        resolve(name)
    assert name in caught.value.message
    assert caught.value.hint


def test_file_in_place_of_a_directory(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        resolve(str(directory / "config.json"))


@pytest.mark.parametrize("offline", [True, False])
def test_hub_id_without_a_network(
    offline: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    def no_network(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("socket.socket.connect", no_network)
    with pytest.raises(CheckpointError, match="neither a directory nor a model") as caught:
        resolve("some-owner/some-model", revision="main")
    assert "some-owner/some-model" in caught.value.message
    assert "network" in str(caught.value.hint)


def test_revision_of_a_directory(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="revision 'main' is of a hub id") as caught:
        resolve(str(tmp_path), "main")
    assert "--revision" in str(caught.value.hint)


def test_name_that_no_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="neither a directory nor a model"):
        resolve("what a strange name!")


def test_hub_snapshot_prefers_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Fields] = []

    def snapshot(name: str, **arguments: Any) -> str:
        calls.append({"name": name, **arguments})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("owner/model", revision="v1") == tmp_path  # only .bin: asked for as well
    assert [call.get("ignore_patterns") for call in calls] == [["*.bin"], None]
    assert {(call["name"], call["revision"]) for call in calls} == {("owner/model", "v1")}
    assert all(call["allow_patterns"] == hub.PATTERNS for call in calls)
    (tmp_path / "model.safetensors").touch()
    resolve("owner/model")
    assert len(calls) == 3
