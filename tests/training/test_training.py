"""A whole training: it helps, the best state is kept, and a kill changes no byte of the result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_training import Reports
from safetensors import safe_open
from tolerances import TORCH_GRADIENT_RELATIVE
from trainings import Options, Run, random_text

from ojfa_export.bundle.shortcut_file import load
from ojfa_export.errors import CalibrationError, UsageError
from ojfa_export.models.calibration_text import CalibrationText
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.training import loop
from ojfa_export.training.divergence import Figures
from ojfa_export.training.draw import draw, draw_outputs, held_out_positions
from ojfa_export.training.kinds import KINDS
from ojfa_export.training.kinds.residual import Residual
from ojfa_export.training.loop import rate, train_jump
from ojfa_export.training.options import TrainOptions
from ojfa_export.training.sizes import CHECKS, Sizes, choose
from ojfa_export.training.state import Keeper
from ojfa_export.training.train import train
from ojfa_export.training.windows import cut, token_ids
from ojfa_export.writing import frozen as frozen_module
from ojfa_export.writing.frozen import Frozen

KINDS_SMALL: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"width": 48}),
    ("residual", {"rank": 16}),
    ("block", {}),
    ("block", {"exits": (1, 3)}),
    ("draft", {}),
    ("draft", {"vocabulary": 64}),
]


@pytest.mark.parametrize(("kind", "size"), KINDS_SMALL)
def test_training_helps(
    kind: str, size: dict[str, int], options: Options, tiny_checkpoint: Path
) -> None:
    asked = options(jump=kind, **size, passes=8)
    result = train(asked)
    shortcut, sha = load(asked.output)
    assert shortcut.kind == kind
    assert sha == Checkpoint(tiny_checkpoint).sha256()
    assert shortcut.parameters == result["parameters"]
    losses = {
        which: np.mean([row[which]["loss"] for row in result["outputs"]])
        for which in ("begin", "jump")
    }
    assert losses["jump"] < 0.97 * losses["begin"]
    history = {row["step"]: row["loss"] for row in result["history"]}
    assert result["best_step"] == min(history, key=lambda step: history[step])
    assert list(history) == sorted(history)
    assert 0 in history
    assert "tokens of source.txt" in result["text"]
    with safe_open(asked.output, framework="numpy") as file:
        recorded = json.loads(file.metadata()["training"])
    assert recorded == json.loads(json.dumps({name: result[name] for name in recorded}))
    assert {"jump", "text", "seed", "steps", "best_step", "passes"} < set(recorded)
    assert [path.name for path in asked.output.parent.iterdir()] == [asked.output.name]


def test_the_kept_state_is_the_best(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of the jump that is left are those of the check that was best, not of the last."""
    losses = iter([9.0, 5.0, 4.0, 6.0, 7.0, 8.0, 3.0])
    states: list[Any] = []

    def check(frozen: Frozen, jump: Any, windows: torch.Tensor, *_: Any) -> Figures:
        if len(windows) == 2:  # the end's, of all held-out windows
            return Figures((2.0 if jump.up.any() else 9.0,) * 3, (0.0,) * 3)
        states.append({name: v.clone() for name, v in jump.state_dict().items()})
        return Figures((next(losses),) * 3, (0.0,) * 3)

    monkeypatch.setattr(loop, "measure", check)
    monkeypatch.setattr(loop, "CHECKED_WINDOWS", 1)
    jump = Residual.begin(frozen, random_text(16, 16), 4, 0)
    trained = train_jump(
        frozen, jump, random_text(16, 16), 50, 0, Keeper(tmp_path / "s"), Reports()
    )
    assert [loss for _, loss in trained.history] == [9, 5, 4, 6, 7, 8]  # then it was stopped
    assert trained.best_step == trained.history[2][0]
    assert trained.steps == trained.history[5][0]
    for name, value in jump.state_dict().items():
        torch.testing.assert_close(value, states[2][name], rtol=0, atol=0)


def test_no_gain_is_the_beginning(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where checks were too hopeful, too: the measurement at the end decides."""
    monkeypatch.setattr(loop, "CHECKED_WINDOWS", 1)
    monkeypatch.setattr(Residual, "learning_rate", 3.0)
    found = loop.measure

    def flatter(frozen: Frozen, jump: Any, windows: torch.Tensor, *rest: Any) -> Figures:
        figures = found(frozen, jump, windows, *rest)
        hopeful = jump.up.any() and len(windows) == 1
        return Figures((-1.0,) * 3, figures.agreement) if hopeful else figures

    monkeypatch.setattr(loop, "measure", flatter)
    jump = Residual.begin(frozen, random_text(16, 16), 4, 0)
    trained = train_jump(frozen, jump, random_text(16, 16), 1, 0, Keeper(tmp_path / "s"), Reports())
    assert trained.best_step == 0
    assert trained.figures == trained.begin
    assert not jump.up.any()


def test_one_window_at_a_time_is_the_same_step(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that leaves little memory: gradients are summed over passes of fewer windows."""
    gradients = []
    for rows in (1, 3, 100):
        monkeypatch.setattr("ojfa_export.training.sizes.rows_at_once", lambda *_, n=rows: n)
        text = random_text(16, 16, given=4)
        jump = KINDS["mlp"].begin(frozen, text, 16, 0)
        monkeypatch.setattr(
            torch.optim.AdamW,
            "step",
            lambda self: gradients.append(
                [p.grad.clone() for g in self.param_groups for p in g["params"]]
            ),
        )
        train_jump(frozen, jump, text, 1, 0, Keeper(tmp_path / str(rows)), Reports())
    steps = len(gradients) // 3
    for one, three, all_ in zip(
        *(gradients[n * steps : (n + 1) * steps] for n in range(3)), strict=True
    ):
        for a, b, c in zip(one, three, all_, strict=True):
            limit = TORCH_GRADIENT_RELATIVE * float(c.abs().max())
            torch.testing.assert_close(a, c, rtol=0, atol=limit)
            torch.testing.assert_close(b, c, rtol=0, atol=limit)


@pytest.mark.parametrize(("kind", "size"), KINDS_SMALL)
def test_half_precision_as_on_a_gpu(
    kind: str, size: dict[str, int], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model and all products in bf16; what is trained stays in fp32."""
    monkeypatch.setattr(frozen_module, "precision", lambda device: torch.bfloat16)
    asked = options(jump=kind, **size, passes=4, self_text=True, tokens=32 * 128)
    result = train(asked)
    losses = np.array([[row[w]["loss"] for w in ("begin", "jump")] for row in result["outputs"]])
    assert losses.mean(0)[1] < losses.mean(0)[0]
    load(asked.output)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "draft" else pytest.mark.slow) for kind in KINDS],
)
def test_kills_change_no_byte(
    kind: str, options: Options, train_in_process: Run, tmp_path: Path
) -> None:
    whole, killed = (
        options(jump=kind, output=tmp_path / f"{name}.safetensors") for name in ("whole", "killed")
    )
    all_, rest = Reports(), Reports()
    train(whole, all_)
    for stop in (3, 5):
        ended = train_in_process(killed, stop)
        assert ended.returncode == -9, ended.stderr
        assert not killed.output.exists()
        assert (tmp_path / "killed.safetensors.partial" / "scratch" / "state.pt").exists()
    train(killed, rest)
    assert killed.output.read_bytes() == whole.output.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "killed.safetensors",
        "whole.safetensors",
    ]
    totals = [dict(each.tasks)["training"] for each in (all_, rest)]
    assert totals[0] - totals[1] == 8 * 2048  # three steps, then five more, were not done again


def test_other_options_start_over(options: Options, train_in_process: Run, tmp_path: Path) -> None:
    def asked(name: str, seed: int) -> TrainOptions:
        return options(output=tmp_path / f"{name}.safetensors", seed=seed, passes=1)

    train(asked("whole", 1))
    assert train_in_process(asked("killed", 0), 3).returncode == -9
    train(asked("killed", 1))
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert (tmp_path / "killed.safetensors").read_bytes() == whole
    train(asked("other", 2))
    assert (tmp_path / "other.safetensors").read_bytes() != whole


def test_output_that_exists(options: Options) -> None:
    options().output.write_text("mine")
    with pytest.raises(UsageError, match="exists already") as caught:
        train(options())
    assert "--overwrite" in str(caught.value.hint)
    train(options(overwrite=True, passes=1))
    load(options().output)


def test_training_that_diverges(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KINDS["mlp"], "learning_rate", 1e30)
    with pytest.raises(CalibrationError, match="training diverged at step") as caught:
        train(options())
    assert caught.value.hint
    assert not options().output.exists()


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(step, 1200) for step in range(1200)]
    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[49:] == sorted(rates[49:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=1e-4)
    assert rate(0, 1) > 0


def test_exits_are_drawn_over_the_whole_depth(rng: np.random.Generator) -> None:
    assert draw_outputs(rng, (1, 2, 3), 3) == [1, 2, 3]
    for exits in (1, 3, 11, 31):
        count = min(5, exits)
        drawn = [draw_outputs(rng, range(1, exits + 1), count) for _ in range(2000)]
        times = np.bincount(np.concatenate(drawn), minlength=exits + 1)
        assert times[0] == 0
        assert (times[1:] > 0).all()
        assert all(len(set(each)) == count for each in drawn)
        deviation = math.sqrt(2000)
        assert (np.diff(times[1:]) < 4 * deviation).all()  # early ones at least as often


def test_steps_read_every_window_once_a_pass(frozen: Frozen) -> None:
    sizes = Sizes(12, 4, 10, 2, 4, 100)
    training = np.arange(0, 48, 2, dtype=np.int32)
    draws = [draw(5, step, sizes, training, 16, 6, (1, 2, 3)) for step in range(12)]
    for first in (0, 6):
        seen = np.concatenate([each.windows for each in draws[first : first + 6]])
        assert sorted(seen.tolist()) == training.tolist()
    assert (draws[0].windows != draws[6].windows).any()
    for each in draws:
        rows, positions = each.tokens.T
        assert len(np.unique(each.tokens, axis=0)) == 10
        assert rows.max() < 4
        assert 6 <= positions.min() <= positions.max() < 16
    assert sum(sizes.checked(step) for step in range(1, 13)) == CHECKS
    assert sizes.checked(12)


def test_sizes_by_text_and_memory(frozen: Frozen) -> None:
    little, much = (choose(frozen.spec, n, 512, 3, 9, None) for n in (500, 100_000))
    assert (little.rows, much.rows) == (4, 32)
    assert little.steps == 375
    assert (little.outputs, choose(frozen.spec, 500, 512, 3, 2, None).outputs) == (5, 2)
    big = frozen.spec.model_copy(
        update={"hidden_size": 4096, "intermediate_size": 11008, "blocks": 32, "vocab_size": 32000}
    )
    roomy, tight = (choose(big, 100_000, 512, 3, 2, n << 30) for n in (125, 4))
    assert roomy.rows_at_once >= roomy.rows == tight.rows == 32
    assert 1 <= tight.rows_at_once < 16


def test_text_is_cut_evenly_from_its_sources() -> None:
    sources = [np.full(count, index, np.int32) for index, count in enumerate((1000, 55, 4000))]
    text = cut(["a", "b", "c"], sources, 10, 1500)
    counts = np.bincount(text.windows[:, 0], minlength=3)
    assert counts.tolist() == [73, 5, 72] or counts.tolist() == [72, 5, 73]
    assert text.about == "1,500 tokens of a, b, c"
    everything = cut(["a", "b", "c"], sources, 10, 10_000)
    assert everything.windows.size == 5050
    assert "all there are of 10,000 asked for" in everything.about
    training, held_out = everything.held_out()
    assert len(held_out) == 63
    assert sorted([*training, *held_out]) == list(range(505))
    # The ends of the three sources, of 100, 5 and 400 windows, in their proportion.
    assert held_out.tolist() == [*range(88, 100), 104, *range(455, 505)]


def test_no_more_is_read_than_is_wanted(tiny_checkpoint: Path) -> None:
    documents = tuple(f"def f{n}():\n    return {n}\n" for n in range(4000))
    text = CalibrationText("many.jsonl", documents, "", 0)
    tokenizer = read_tokenizer(tiny_checkpoint)
    (whole,) = token_ids([text], tokenizer, 10**9)
    (part,) = token_ids([text], tokenizer, 100)
    assert 100 <= len(part) < len(whole)
    np.testing.assert_array_equal(part, whole[: len(part)])


def test_measured_tokens_of_a_chain_are_neighbours() -> None:
    found = held_out_positions(3, 50, 64, 8, 500, together=True)
    assert found.shape == (50, 10)
    assert (np.diff(found, axis=1) == 1).all()
    assert found[:, 0].min() >= 8
    assert found.max() <= 63
    assert len(np.unique(found[:, 0])) > 10
    assert held_out_positions(3, 2, 64, 8, 500, together=True).shape == (2, 56)
