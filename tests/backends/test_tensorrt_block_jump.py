"""Block jumps of the TensorRT backend on a stand-in for the GPU, against their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from jumped_programs import (
    BATCH,
    MAX_LENGTH,
    Jumped,
    examples,
    make_jumped,
    programs,
    run_program,
)
from stand_in.kernels import view
from tiny_models import VOCAB_SIZE

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.runtime.decoding import StepByStep
from ojfa_export.runtime.session import Session

# Other families, precisions, windows and rotations; a block for all exits, and one for each.
CASES = ["llama-gqa", "phi3-longrope", "gemma2", "qwen3-fp16", "mistral-sliding-window-bf16"]
Opened = tuple[Jumped, Any]


@pytest.fixture(scope="module")
def opened(driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    """A model and its engines, built when first asked for."""
    from ojfa_export.backends.tensorrt.backend import BACKEND

    made: dict[str, Opened] = {}

    def make(name: str) -> Opened:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            jump = make_jumped(name, directory, seed=len(made))
            (directory / "built").mkdir()
            made[name] = jump, jump.chain.open_on(BACKEND, directory / "built")
        return made[name]

    return make


def session_of(opened: Opened, batch: int = BATCH, length: int = MAX_LENGTH) -> Session:
    jump, engines = opened
    return Session(jump.chain.spec, engines, batch, length)


def poison(session: Session) -> None:
    """Puts NaN wherever nothing that counts may lie, in what exits and their blocks have kept."""
    runner, marks = session._runner, session.watermarks
    runner.engines.device.synchronize()
    behind = runner.exits.executor
    pages = behind._cache.pages
    for exit, block in behind._blocks.items():
        for array in (block._keys, block._values):
            kept = view(array.pointer, behind_dtype(array), *array.shape)
            for sequence in session._sequences:
                for index, page in enumerate(pages._held[sequence.slot]):
                    first = max(0, sequence.exits.get(exit, 0) - index * kept.shape[2])
                    kept[page, :, first:] = np.nan
    for depth, waiting in runner.pending.items():
        kept = view(waiting.pointer, np.float32, *waiting.shape)
        for sequence in session._sequences:
            known = min(marks[depth, sequence.slot], sequence.exits.get(depth, MAX_LENGTH))
            kept[sequence.slot, :known] = np.nan
            kept[sequence.slot, marks[depth - 1, sequence.slot] :] = np.nan


def behind_dtype(array: Any) -> Any:
    """bf16 is uint16 to the backend."""
    import ml_dtypes

    return ml_dtypes.bfloat16 if array.dtype == np.uint16 else array.dtype


@pytest.mark.parametrize("name", CASES)
@settings(examples, max_examples=10)
@given(program=programs)
def test_whatever_came_before_it_is_the_definition(name, opened, program):
    run_program(opened(name)[0], session_of(opened(name)), program, poison)


@pytest.mark.parametrize("decides", [False, True])
def test_a_step_is_one_launch(decides, opened, driver, monkeypatch):
    """From the embedding to the choice, the exit's block among it; and one more past an exit, which
    the check has begun already.
    """
    case, begun = opened("llama-gqa"), []
    session = session_of(case, 1)
    executor = session._runner.executor
    begin = executor.begin
    monkeypatch.setattr(executor, "begin", lambda *given: begun.append(1) or begin(*given))
    exit: Any = 3
    if decides:
        exit = ExitPolicy(exits=(1, 3), measure="top", thresholds=(9.0, 0.0))
    decoder = StepByStep(session, exit, Sampling(), [Sampling().generator(0)])
    pending, launched = [[1, 2, 3]], []
    for step in range(12):
        driver.launched.clear()
        pending = [[token.id for token in each] for each in decoder.step(pending, [12 - step])]
        launched.append(list(driver.launched))
    decoder.end()
    assert bool(begun) == decides
    for each in launched[6:-1]:
        assert each == ["graph"] * (2 if decides else 1)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_prompt_in_pieces(opened, rng, monkeypatch, kernels):
    """More tokens than run at once; and in TensorRT's engines, which the model's blocks share."""
    from ojfa_export.backends.tensorrt import exit_blocks

    jump, engines = opened("llama-gqa")
    monkeypatch.setattr(exit_blocks, "EXIT_TOKENS", 16)
    monkeypatch.setattr(exit_blocks, "SIZES", (16,))
    monkeypatch.setattr(engines, "decode_kernels", kernels)
    session = session_of((jump, engines), 2)
    prompts = rng.integers(VOCAB_SIZE, size=(2, 27)).tolist()
    for _ in range(3):  # recorded, and replayed
        for exit in (3, 1):
            session.rewind(0, 0)
            session.rewind(0, 1)
            for new in (prompts, [[5], [6, 7]]):
                every = session.advance(new, exit, every_position=True)
                for row, logits in enumerate(every):
                    jump.check(logits, session.tokens(row), exit)
    engines.device.recorder.clear()
