"""Requests whose exits a check head decides, together with others: as each alone, and no dearer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import random_blocks
from engine.random_requests import TIMEOUT, check_each_gives_what_it_gives_alone
from engine.watched_engine import WatchedEngine
from stand_in import stand_in_gpu

import ojfa_export
from ojfa_export.bundle.shortcut_file import save
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT


@pytest.fixture(scope="module", params=["residual", "block"])
def checked(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    calibration_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Model:
    directory = tmp_path_factory.mktemp("checked")
    shortcut: Any = request.param
    if shortcut == "block":
        checkpoint, shortcut = Checkpoint(tiny_checkpoint), directory / "jump.safetensors"
        blocks = random_blocks(checkpoint.spec, (1, 2, 3), seed=6)
        save(blocks, shortcut, checkpoint.sha256(), {"text": "made up"})
    options = BuildOptions(
        str(tiny_checkpoint),
        directory / "checked.ojfa",
        rank=None if request.param == "block" else 8,
        shortcut=shortcut,
        check_vocabulary=40,
        calibration_data=(calibration_text,),
        calibration_tokens=1024,
        max_cache_length=96,
        skip_verification=True,
    )
    return ojfa_export.load(build(options).bundle)


def policy_of(model: Model, exits: tuple[int, ...], measure: Any, share: float) -> ExitPolicy:
    """A policy by which about such a share of made-up tokens leaves at each exit."""
    ids = np.random.default_rng(4).integers(model.spec.vocab_size, size=60).tolist()
    never = ExitPolicy(exits=exits, measure=measure, thresholds=(9.0,) * len(exits))
    session = model.session()
    said = np.stack([session.decide([token], never).confidence[:, 0] for token in ids])
    return never.model_copy(update={"thresholds": tuple(np.quantile(said, 1 - share, axis=0))})


def random_requests(checked: Model, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Of every way to decode, joining at random: also such as ask several exits in one pass.

    Some begin alike, with more tokens than a page of a device's cache.
    """
    some = policy_of(checked, (1, 3), "top", 0.4)
    others = policy_of(checked, (2,), "margin", 0.5)
    ways: list[dict[str, Any]] = [
        {"exit": some},
        {"exit": some, "temperature": 0.9, "seed": 3},
        {"exit": others},
        {"exit": others, "logprobs": 2},
        {"exit": some, "repetition_penalty": 1.4},
        {"exit": 2},
        {"exit": "full"},
        {"exit": "full", "speculate": True},
    ]
    return [
        {
            "prompt": (
                list(range(70)) if rng.random() < 0.4 else [],
                rng.integers(320, size=rng.integers(1, 7)).tolist(),
            ),
            "options": {"max_new_tokens": int(rng.integers(1, 20)), **ways[index]},
            "comes": int(rng.integers(12)),
            "cancelled_after": None,
        }
        for index in rng.integers(len(ways), size=10)
    ]


def test_requests_give_the_tokens_of_each_alone(checked: Model, rng: np.random.Generator) -> None:
    for _ in range(3):
        requests, slots = random_requests(checked, rng), int(rng.integers(2, 6))
        engine = check_each_gives_what_it_gives_alone(checked, checked, requests, slots, 100)
        assert not engine.ahead


def check_that_nothing_is_recorded_after_warming_up(
    model: Model, policy: ExitPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, captured = model.engines.device, []

    def capture(work: Any) -> Any:
        captured.append(work)
        return type(device).capture(device, work)

    with monkeypatch.context() as patch, WatchedEngine(model, max_sequences=1) as engine:
        patch.setattr(device, "capture", capture)
        engine.warm_up(exits=policy.exits)
        before = len(captured)
        running = engine.submit([5, 6, 7], exit=policy, max_new_tokens=20, ignore_eos=True)
        assert len(set(running.result(TIMEOUT).exit_blocks)) > 1
        assert len(captured) == before


def test_requests_on_a_device(
    checked: Model, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stand-in for a GPU, whose heads give tokens and no logits."""
    copy = shutil.copytree(checked.bundle.directory, tmp_path / "device.ojfa")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with stand_in_gpu():
        add_engines(copy, "tensorrt", SILENT)
        device = ojfa_export.load(copy, backend="tensorrt")
        if checked.manifest.shortcut.exits is None:
            policy = policy_of(checked, (2,), "top", 0.5)
            check_that_nothing_is_recorded_after_warming_up(device, policy, monkeypatch)
        for _ in range(2):
            requests, slots = random_requests(checked, rng), int(rng.integers(2, 6))
            pages = int(rng.integers(5, 12))  # some wait for others' pages
            check_each_gives_what_it_gives_alone(device, checked, requests, slots, pages)
        del device


def test_whoever_goes_on_asks_the_whole_head_once(
    checked: Model, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    policy = policy_of(checked, (2,), "top", 0.5)
    counts = {"logits": 0, "logits_of_exits": 0, "check_logits": 0}

    def counted(name: str) -> Any:
        real = getattr(checked.engines, name)

        def ask(hidden: Any, blocks_run: Any) -> Any:
            counts[name] += len(hidden)
            return real(hidden, blocks_run)

        return ask

    for name in counts:
        monkeypatch.setattr(checked.engines, name, counted(name))
    with WatchedEngine(checked, max_sequences=4) as engine:
        requests = [
            engine.submit(
                rng.integers(320, size=5).tolist(), exit=policy, max_new_tokens=20, ignore_eos=True
            )
            for _ in range(4)
        ]
        depths = [depth for each in requests for depth in each.result(TIMEOUT).exit_blocks]
    assert set(depths) == {2, 4}
    assert counts["check_logits"] == len(depths) == 80
    # Each token is one row of a whole head, at the exit where it left or at full depth.
    assert counts["logits"] + counts["logits_of_exits"] == len(depths)
