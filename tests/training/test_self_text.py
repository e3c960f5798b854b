"""Text that the model writes: what transformers' model allows, kept, gone on with after a kill."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_training import Reports
from tolerances import PROBABILITY_FP32
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ojfa_export.errors import CalibrationError, CheckpointError
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.training.options import TrainOptions
from ojfa_export.training.train import train
from ojfa_export.writing import self_text
from ojfa_export.writing.frozen import Frozen
from ojfa_export.writing.self_text import (
    START_TOKENS,
    Starts,
    chat_start,
    find_starts,
    generate,
    sample,
    write,
)

Options = Callable[..., TrainOptions]
Run = Callable[..., subprocess.CompletedProcess[str]]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}[be kind]{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
)


def allowed(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities [n, V] by transformers' own warpers."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    warm = TemperatureLogitsWarper(0.9)(ids, logits)
    return TopPLogitsWarper(0.95)(ids, warm).softmax(-1)


@pytest.fixture
def chatty(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with a chat template."""
    directory = Path(shutil.copytree(tiny_checkpoint, tmp_path / "chatty"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return directory


@pytest.fixture
def starts(rng: np.random.Generator) -> Starts:
    ids = rng.integers(0, 300, size=500).astype(np.int32)
    return Starts((7, 8, 9), ids, ("a.txt",))


def test_draws_have_the_probabilities_of_top_p(rng: np.random.Generator) -> None:
    logits = torch.from_numpy(rng.normal(size=(1, 12)) * 2).float()
    wanted = allowed(logits)[0].numpy()
    assert 0 < (wanted > 0).sum() < 12
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    count = 20_000
    tokens, likely = sample(logits.expand(count, 12), generator)
    plain = (logits[0] / 0.9).softmax(-1)
    torch.testing.assert_close(likely[:, 0], plain[tokens[:, 0]], rtol=0, atol=PROBABILITY_FP32)
    found = np.bincount(tokens.numpy()[:, 0], minlength=12) / count
    assert not found[wanted == 0].any()
    deviation = np.sqrt(wanted * (1 - wanted) / count)
    assert (np.abs(found - wanted) <= 5 * deviation + PROBABILITY_FP32).all()


def test_every_token_is_one_that_the_model_allows(frozen: Frozen, starts: Starts) -> None:
    """By one pass over the whole text: the cache, the positions and the sampling are right."""
    start = starts.ids[:120].reshape(5, 24)
    ids = generate(frozen, start, 100, torch.Generator().manual_seed(3))
    assert ids.shape == (5, 100)
    np.testing.assert_array_equal(ids[:, :24], start)
    with torch.no_grad():
        logits = frozen.model(torch.from_numpy(ids).long()).logits[:, 23:-1]
    probabilities = allowed(logits.reshape(-1, logits.shape[-1]))
    drawn = probabilities.gather(1, torch.from_numpy(ids[:, 24:]).long().reshape(-1, 1))
    assert (drawn > 0).all()
    # Surprisal of the drawn tokens is their entropy on average; 380 of them.
    entropy = torch.special.entr(probabilities).sum(-1)
    surprisal = -drawn[:, 0].log()
    deviation = float((surprisal - entropy).std() / len(entropy) ** 0.5)
    assert abs(float((surprisal - entropy).mean())) < 5 * deviation


def test_half_begins_with_the_template_half_with_the_text(
    frozen: Frozen, starts: Starts, tmp_path: Path
) -> None:
    text = write(frozen, starts, 60, 16 * 60, 0, tmp_path / "text", Reports())
    assert text.windows.shape == (16, 60)
    assert text.given == START_TOKENS
    chat = (text.windows[:, :3] == [7, 8, 9]).all(1)
    assert chat.sum() == 8
    known = {tuple(starts.ids[n : n + 24]) for n in range(500 - 24)}
    assert all(tuple(each[:24]) in known for each in text.windows[~chat])
    assert "960 tokens that the model wrote, half from its chat template" in text.about
    assert "a.txt" in text.about
    plain = Starts((), starts.ids, starts.names)
    text = write(frozen, plain, 60, 16 * 60, 0, tmp_path / "plain", Reports())
    assert all(tuple(each[:24]) in known for each in text.windows)
    assert "wrote, from 24 tokens of a.txt" in text.about


def test_kept_batches_are_not_written_again(
    frozen: Frozen, starts: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "CPU_ROWS", 4)
    whole = write(frozen, starts, 60, 18 * 60, 0, tmp_path / "whole", Reports())

    def stop(report: int) -> None:
        if report == 90:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(frozen, starts, 60, 18 * 60, 0, tmp_path / "text", Reports(stop))
    kept = sorted(path.name for path in (tmp_path / "text").iterdir())
    assert kept == ["000000.npy"]
    progress = Reports()
    again = write(frozen, starts, 60, 18 * 60, 0, tmp_path / "text", progress)
    assert progress.tasks == [("writing text", 15 * 60)]
    np.testing.assert_array_equal(again.windows, whole.windows)
    other = write(frozen, starts, 60, 18 * 60, 1, tmp_path / "other", Reports())
    assert (other.windows != whole.windows).any()


def test_a_training_on_self_text_survives_a_kill(
    options: Options, train_in_process: Run, chatty: Path, tmp_path: Path
) -> None:
    def asked(name: str) -> TrainOptions:
        return options(
            checkpoint=str(chatty),
            output=tmp_path / f"{name}.safetensors",
            self_text=True,
            tokens=16 * 128,
        )

    result = train(asked("whole"))
    assert "2,048 tokens that the model wrote, half from its chat template" in result["text"]
    # Two batches of eight windows: while the second is written.
    ended = train_in_process(asked("killed"), 180)
    assert ended.returncode == -9, ended.stderr
    kept = tmp_path / "killed.safetensors.partial" / "scratch" / "text"
    assert len(list(kept.glob("*.npy"))) == 1
    train(asked("killed"))
    killed, whole = (tmp_path / f"{name}.safetensors" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()


def test_the_template_up_to_the_users_words(chatty: Path, tiny_checkpoint: Path) -> None:
    assert chat_start(chatty) == "[be kind]<user>"
    assert chat_start(tiny_checkpoint) == ""
    tokenizer = read_tokenizer(chatty)
    ids = np.arange(100, dtype=np.int32)
    starts = find_starts(chatty, tokenizer, ["a"], [ids], 128, "--text")
    assert tokenizer.decode(list(starts.chat)) == "[be kind]<user>"
    assert starts.given == START_TOKENS


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "can't be rendered: division by zero"),
        ("{% if %}", "can't be rendered: "),
        ("nobody said a word", "loses the user's words"),
        ("word " * 90 + "{{ messages[0]['content'] }}", "more than half of a window of 128"),
    ],
)
def test_templates_that_do_not_help(template: str, said: str, chatty: Path) -> None:
    (chatty / "chat_template.jinja").write_text(template)
    ids = [np.arange(100, dtype=np.int32)]
    with pytest.raises(CheckpointError, match=said) as caught:
        find_starts(chatty, read_tokenizer(chatty), ["a"], ids, 128, "--text")
    assert "--self-text" in str(caught.value.hint)


def test_too_little_to_begin_from(chatty: Path) -> None:
    ids: list[Any] = [np.arange(START_TOKENS, dtype=np.int32)]
    with pytest.raises(CalibrationError, match="the text has 24 tokens") as caught:
        find_starts(chatty, read_tokenizer(chatty), ["a"], ids, 128, "--text")
    assert "--text" in str(caught.value.hint)
