"""The demo checkpoint, the calibration text, and the scripts that made them."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from calibration.text import collect

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CALIBRATION = Path(__file__).resolve().parent.parent / "calibration"
CHECKPOINT = CALIBRATION / "demo" / "checkpoint"
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
CONTEXT = 512


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def windows():
    """Every fifth window of the calibration code, int64 [windows, CONTEXT]."""
    text = (CALIBRATION / "text" / "code.txt").read_text(encoding="utf-8")
    ids = torch.tensor(TOKENIZER.encode(text).ids)
    return ids[: ids.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT)[::5]


def test_size_and_shape_are_as_promised():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 12
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 12_000_000


def test_weights_are_fp16_finite_and_stored_once():
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert 4_500_000 <= sum(tensor.numel() for tensor in tensors.values()) <= 6_000_000


@given(st.text())
def test_tokenizer_restores_any_text(text):
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_transformers_reads_the_same_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "  def f(x):\n\treturn 'é' if x else None  # \U0001f40d\n"
    assert tokenizer(text).input_ids == TOKENIZER.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == TOKENIZER.token_to_id("<|endoftext|>")


def test_held_out_loss_is_the_reported_one(model, windows):
    reported = json.loads((CHECKPOINT / "training.json").read_text())
    losses = []
    with torch.inference_mode():
        for batch in windows.split(8):
            logits = model(batch, use_cache=False).logits[:, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), batch[:, 1:], reduction="none"
                )
            )
    loss = float(torch.cat(losses).mean())
    assert abs(loss - reported["held_out_loss_nats_per_token"]) < tolerances.HELD_OUT_LOSS_NATS


def test_exits_differ_and_agree_more_with_depth(model, windows):
    with torch.inference_mode():
        output = model(windows[:4], use_cache=False, output_hidden_states=True)
        full = output.logits.argmax(-1)
        agreement = [
            float((model.lm_head(model.model.norm(hidden)).argmax(-1) == full).float().mean())
            for hidden in (output.hidden_states[blocks] for blocks in (3, 6, 9, 11))
        ]
    assert agreement == sorted(set(agreement))
    assert agreement[-1] < 1.0


@pytest.mark.parametrize(("name", "size"), [("code.txt", 500_000), ("docs.txt", 300_000)])
def test_calibration_text_is_clean(name, size):
    data = (CALIBRATION / "text" / name).read_bytes()
    text = data.decode("utf-8")
    assert 0.95 * size <= len(data) <= size
    assert "\r" not in text
    assert "\0" not in text
    assert not collect.UNWANTED.search(text)


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="made from Python 3.11.7")
def test_calibration_text_can_be_collected_again(tmp_path):
    script = CALIBRATION / "text" / "collect.py"
    subprocess.run([sys.executable, script, "-o", tmp_path], check=True)
    for name in ("code.txt", "docs.txt"):
        assert (tmp_path / name).read_bytes() == (CALIBRATION / "text" / name).read_bytes()


def test_selection_is_bounded_and_independent_of_order():
    documents = [(f"file{i}", f"x = {i}\r\n" * 50) for i in range(40)]
    documents.append(("bad", "import winregistry\n"))
    text = collect.select(documents, 5_000)
    assert text == collect.select(documents[::-1], 5_000)
    assert 4_000 < len(text.encode()) <= 5_000
    assert "registry" not in text


@pytest.mark.slow
def test_a_tiny_training_run_gives_a_loadable_checkpoint(tmp_path):
    stdlib, source = Path(sysconfig.get_path("stdlib")), tmp_path / "source"
    source.mkdir()
    for name in ("bisect", "calendar", "cmd", "copy", "fnmatch", "queue", "sched", "token"):
        text = (stdlib / f"{name}.py").read_text(encoding="utf-8")
        (source / f"{name}.py").write_text(text[:1_000], encoding="utf-8")
    output = tmp_path / "checkpoint"
    options = ["--held-out-share=0.5", "--steps=3", "--batch=2", "--context=64", "--device=cpu"]
    script = CALIBRATION / "demo" / "train.py"
    command = [sys.executable, script, "--stdlib", source, "-o", output, *options]
    # One thread: several that spin for the same busy cores take minutes for these seconds.
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    training = json.loads((output / "training.json").read_text())
    trained = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert training["steps"] == 3
    assert training["tokens_seen"] == 3 * 2 * 64
    # Three steps at the start of the warm-up leave the model next to a uniform guess.
    uniform = math.log(trained.config.vocab_size)
    assert abs(training["held_out_loss_nats_per_token"] - uniform) < 0.5
    assert trained.config.num_hidden_layers == 12
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    ids = tokenizer.encode("def f():\n").ids
    assert trained(torch.tensor([ids])).logits.isfinite().all()


def test_training_refuses_to_overwrite(tmp_path):
    script = CALIBRATION / "demo" / "train.py"
    result = subprocess.run(
        [sys.executable, script, "-o", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "exists" in result.stderr
