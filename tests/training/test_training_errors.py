"""What a user may get wrong: one line that says what, and one what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from ojfa_export.cli.app import app
from ojfa_export.errors import OjfaError, UsageError
from ojfa_export.training import state
from ojfa_export.training.options import TrainOptions, count
from ojfa_export.training.train import train

Options = Callable[..., TrainOptions]


@pytest.fixture
def invoke(tiny_checkpoint: Path, calibration_text: Path, tmp_path: Path) -> Callable[..., Result]:
    def call(*more: object, checkpoint: Path = tiny_checkpoint) -> Result:
        arguments = ["train", str(checkpoint), "-o", str(tmp_path / "jump.safetensors")]
        arguments += ["--text", str(calibration_text), "--device", "cpu"]
        return CliRunner().invoke(app, [*arguments, *map(str, more)])

    return call


@pytest.fixture
def changed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "changed"))


CASES = {
    "kind": (["--jump", "hop"], 2, "jump 'hop' is not known", "known: mlp, residual, "),
    "width of a residual jump": (
        ["--jump", "residual", "--width", 8],
        2,
        "width is nothing that a jump of kind 'residual' has",
        "leave --width out; what it has is --rank",
    ),
    "rank of an mlp": (
        ["--rank", 8],
        2,
        "rank is nothing that a jump of kind 'mlp' has",
        "leave --rank out; what it has is --width",
    ),
    "width": (["--width", 0], 2, "width must be 1 or more, not 0", None),
    "width beyond": (["--width", 104], 2, "width 104 does not suit this model", "leave --width"),
    "width that is odd": (["--width", 20], 2, "must be a multiple of 8, at most 96", "leave"),
    "rank": (["--jump", "residual", "--rank", 65], 2, "rank 65 is larger than", "1 to 64"),
    "vocabulary of an mlp": (
        ["--vocabulary", 8],
        2,
        "vocabulary is nothing that a jump of kind 'mlp' has",
        "leave --vocabulary out; what it has is --width",
    ),
    "exits of an mlp": (
        ["--exits", "1,2"],
        2,
        "exits is nothing that a jump of kind 'mlp' has",
        "leave --exits out; what it has is --width",
    ),
    "no list": (["--jump", "block", "--exits", "1,b"], 2, "is no list of exits", "train --help"),
    "exit 0": (["--jump", "block", "--exits", "0,1"], 2, "an exit must be 1 or more, not 0", None),
    "exits that fall": (
        ["--jump", "block", "--exits", "2,1"],
        2,
        "exits 2,1 do not suit this model: they must rise, from 1 to 3 at most",
        "leave --exits out for one block for all exits",
    ),
    "exits twice": (["--jump", "block", "--exits", "2,2"], 2, "exits 2,2 do not suit", "leave"),
    "exits beyond": (["--jump", "block", "--exits", "1,4"], 2, "from 1 to 3 at most", "leave"),
    "no vocabulary": (["--jump", "draft", "--vocabulary", 0], 2, "must be 1 or more, not 0", None),
    "odd vocabulary": (
        ["--jump", "draft", "--vocabulary", 20],
        2,
        "vocabulary 20 does not suit this model: it must be a multiple of 8, and below 320",
        "leave --vocabulary out for the model's own head",
    ),
    "large vocabulary": (
        ["--jump", "draft", "--vocabulary", 320],
        2,
        "vocabulary 320 does not suit this model",
        "leave --vocabulary out",
    ),
    "tokens": (["--tokens", "lots"], 2, "tokens must be a number, or one with k or M", "8M"),
    "few tokens": (["--tokens", "1k"], 1, "1000 tokens are too few to train on", "--tokens 2048"),
    "hardly a token": (["--tokens", 10], 1, "10 tokens are too few to train on", "--tokens 2048"),
    "few tokens of its own": (
        ["--self-text", "--tokens", "1k"],
        1,
        "1000 tokens are too few to train on",
        "--tokens 2048",
    ),
    "passes": (["--passes", 0], 2, "passes must be between 1 and 1000, not 0", None),
    "seed": (["--seed", -1], 2, "seed must be between 0 and", None),
    "no such text": (["--text", "missing.txt"], 1, "missing.txt can't be read", "name a text"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_usage(name: str, invoke: Callable[..., Result], tmp_path: Path) -> None:
    arguments, status, message, hint = CASES[name]
    result = invoke(*arguments)
    assert result.exit_code == status, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert len(lines) == (1 if hint is None else 2)
    if hint is not None:
        assert lines[1].startswith("hint: ")
        assert hint in lines[1]
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_too_short(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("def main():\n" * 20)
    arguments = [
        "train",
        str(tiny_checkpoint),
        "-o",
        str(tmp_path / "x.safetensors"),
        "--text",
        str(text),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "in whole windows of 128, and training needs 2048" in result.stderr
    assert "hint: give more --text, or let the model write it with --self-text" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(invoke: Callable[..., Result]) -> None:
    result = invoke("--device", "cuda")
    assert result.exit_code == 2
    assert "device 'cuda' was asked for, but torch finds no CUDA device here" in result.stderr
    assert "hint: leave --device out" in result.stderr


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_package_that_is_not_installed(package: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\nfrom ojfa_export.cli import main\nmain()"
    )
    arguments = ["train", str(tiny_checkpoint), "-o", str(tmp_path / "x.safetensors")]
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: training needs the package {package}, which is not installed",
        "hint: pip install 'ojfa-export[build,verify]'",
    ]


def test_output_that_is_there(invoke: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "jump.safetensors").write_text("mine")
    result = invoke()
    assert result.exit_code == 2
    assert "exists already" in result.stderr
    assert "hint: choose another output, or add --overwrite" in result.stderr
    assert (tmp_path / "jump.safetensors").read_text() == "mine"


def test_one_block(invoke: Callable[..., Result], changed: Path) -> None:
    config = json.loads((changed / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (changed / "config.json").write_text(json.dumps(config))
    result = invoke(checkpoint=changed)
    assert result.exit_code == 1
    assert "has one block, and so no exit" in result.stderr
    assert "hint: a jump needs a model of two blocks or more" in result.stderr


def test_two_blocks_are_too_few_for_a_draft(invoke: Callable[..., Result], changed: Path) -> None:
    config = json.loads((changed / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (changed / "config.json").write_text(json.dumps(config))
    result = invoke("--jump", "draft", checkpoint=changed)
    assert result.exit_code == 1
    assert "the model has 2 blocks; a draft sees its states at three depths" in result.stderr
    assert "hint: train a jump of another kind: --jump mlp" in result.stderr


def test_tokenizer_of_another_model(invoke: Callable[..., Result], changed: Path) -> None:
    tensors = load_file(changed / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].contiguous()
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    config = json.loads((changed / "config.json").read_text())
    config["vocab_size"] = 200
    (changed / "config.json").write_text(json.dumps(config))
    result = invoke(checkpoint=changed)
    assert result.exit_code == 1
    assert "but the model has 200 tokens" in result.stderr
    assert "hint: tokenizer and weights belong to different models" in result.stderr


@pytest.mark.parametrize("more", [[], ["--self-text"]])
def test_logits_that_are_no_numbers(
    more: list[str], invoke: Callable[..., Result], changed: Path, tmp_path: Path
) -> None:
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    result = invoke("--tokens", "3k", *more, checkpoint=changed)
    assert result.exit_code == 1
    assert "gives logits that are NaN or infinite on this text" in result.stderr
    assert "hint: its weights are damaged, or it overflows" in result.stderr
    assert not (tmp_path / "jump.safetensors").exists()
    assert not (tmp_path / "jump.safetensors.partial").exists()


def test_full_disk(
    invoke: Callable[..., Result], options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(state, "SAVE_SECONDS", 0.0)
        patch.setattr("ojfa_export.system.atomic.os.fsync", no_space)
        result = invoke("--tokens", "20k", "--passes", "1")
        assert result.exit_code == 1
        assert f"error: no space left on {tmp_path}" in result.stderr
        assert "hint: free some room and run the same command again" in result.stderr
    assert not (tmp_path / "jump.safetensors").exists()
    train(options(passes=1))
    assert [path.name for path in tmp_path.iterdir()] == ["jump.safetensors"]


def test_counts() -> None:
    for given, wanted in (("8M", 8_000_000), ("300k", 300_000), ("1.5m", 1_500_000), (7, 7)):
        assert count("tokens", given) == wanted
    for given in ("", "M", "1.2345k", "-1", "0", "1e6", 1.5, True, None, "9" * 20):
        with pytest.raises(UsageError, match="tokens must be"):
            count("tokens", given)


def test_options_are_checked(tmp_path: Path) -> None:
    for wrong in ({"device": "tpu"}, {"text": "a.txt"}, {"jump": 3}, {"self_text": 1}):
        with pytest.raises(UsageError):
            TrainOptions("checkpoint", tmp_path / "x.safetensors", **wrong)


def test_what_is_said(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke("--tokens", "3k", "--passes", "1", "-q")
    assert result.exit_code == 0, result.stderr
    assert "tokens of source.txt" in result.stdout
    assert "Agreement with the full model" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[-3:]] == ["1", "2", "3"]
    result = invoke("--tokens", "3k", "--passes", "1", "-q", "--overwrite", "--jump", "draft")
    assert result.exit_code == 0, result.stderr
    titles, *rows = (line.split() for line in result.stdout.splitlines()[-5:])
    assert titles[:7] == ["draft", "at", "first", "trained", "chain,", "at", "first"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[1].endswith("%") for row in rows] == [True] * 4
    result = invoke("--tokens", "3k", "--passes", "1", "--overwrite", "--json")
    document = json.loads(result.stdout)
    assert [row["exit"] for row in document["outputs"]] == [1, 2, 3]
    assert document["shortcut"] == str(tmp_path / "jump.safetensors")
    assert "training: 2" in result.stderr
    assert "tokens" in result.stderr


def test_a_jump_has_the_name_that_build_wants(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"doesn't end in \.safetensors") as caught:
        TrainOptions("checkpoint", tmp_path / "jump")
    assert str(tmp_path / "jump.safetensors") in caught.value.hint


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(OjfaError, match=r"state\.pt.* is damaged") as caught:
        state.Keeper(path).load(torch.device("cpu"))
    assert "remove it" in caught.value.hint
