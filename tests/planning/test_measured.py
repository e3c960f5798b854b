"""Costs and readings with a clock that moves only with the engines' work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from known_costs import ClockedEngines, step_costs
from test_frontier import replay

import ojfa_export
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import CalibrationError, UsageError
from ojfa_export.planning.frontier import round_ms
from ojfa_export.planning.reading import PIECE, cut_pieces, read_bundle, read_pieces, settling
from ojfa_export.planning.step_costs import measure_costs, measure_exits
from ojfa_export.planning.traffic import block_bytes
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT


@pytest.fixture
def clocked(tiny_bundle: Path) -> tuple[Model, ClockedEngines]:
    model = ojfa_export.load(tiny_bundle)
    model.engines = engines = ClockedEngines(model.engines)
    return model, engines


@pytest.mark.parametrize("blocks_loaded", [4, 2])
@pytest.mark.parametrize("length", [64, 20])
def test_costs_are_found(
    clocked: tuple[Model, ClockedEngines], blocks_loaded: int, length: int
) -> None:
    model, engines = clocked
    found = measure_costs(
        model.spec, engines, length, rounds=2, seconds=1e9, progress=SILENT, clock=engines.clock,
        most_bytes=blocks_loaded * block_bytes(model.spec),
    )  # fmt: skip
    expected = step_costs(4).model_dump()
    for name, value in found.model_dump().items():
        assert value == pytest.approx(expected[name], abs=1e-9), name
    exits = measure_exits(
        model.spec, engines, length, rounds=1, seconds=1e9, progress=SILENT, clock=engines.clock
    )
    assert exits == pytest.approx(expected["exits"], abs=1e-9)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_short_caches_are_timed_as_far_as_they_go(
    clocked: tuple[Model, ClockedEngines], length: int
) -> None:
    model, engines = clocked
    found = measure_costs(
        model.spec, engines, length, rounds=1, seconds=1e9, progress=SILENT, clock=engines.clock
    )
    assert found.exits == pytest.approx(step_costs(4).exits)


def test_no_more_rounds_than_there_is_time_for(clocked: tuple[Model, ClockedEngines]) -> None:
    model, engines = clocked
    measure_costs(model.spec, engines, 64, rounds=3, seconds=1e9, progress=SILENT)
    for seconds in (1e9, 0.0):
        before = engines.now
        measure_costs(model.spec, engines, 64, rounds=9, seconds=seconds, progress=SILENT)
        taken = engines.now - before
        three = taken / 3 if seconds else taken
        if seconds:
            whole = three
    assert three == pytest.approx(whole, rel=0.05)  # the prompt comes on top of the rounds


def test_readings_are_the_engines_time(
    clocked: tuple[Model, ClockedEngines], rng: np.random.Generator
) -> None:
    model, engines = clocked
    pieces = rng.integers(1, model.spec.vocab_size, (3, 41)).astype(np.int32)
    policy = ExitPolicy(exits=(1, 3), measure="top", thresholds=(0.012, 0.012))
    ways = {"full": 4, "two": 2, "policy": policy, "drafting": Speculation(2, 3)}
    found = read_pieces(model, pieces, ways, 8, SILENT, 2, engines.clock)
    costs = step_costs(4)
    assert found["full"].ms_per_token == pytest.approx(costs.full)
    assert found["full"].agreement == 1
    assert found["two"].ms_per_token == pytest.approx(costs.exits[1])
    session, depths, agreed = model.session(1, 41), [], []
    for piece in pieces.tolist():
        session.rewind(0)
        session.advance(piece[: 8 - settling(8)])
        steps = [session.decide([token], policy) for token in piece[8 - settling(8) : -1]]
        depths.append([int(step.blocks_run[0]) for step in steps])
        session.rewind(8)
        full = [int(session.advance([token])[0].argmax()) for token in piece[8:-1]]
        chosen = [int(step.logits[0].argmax()) for step in steps[settling(8) :]]
        agreed += [one == other for one, other in zip(chosen, full, strict=True)]
    expected = np.mean([replay(np.array(piece), policy, 4, settling(8)) for piece in depths])
    assert found["policy"].ms_per_token == pytest.approx(expected)
    assert found["policy"].blocks == pytest.approx(
        np.mean([piece[settling(8) :] for piece in depths])
    )
    assert found["policy"].agreement == pytest.approx(np.mean(agreed))
    drafting = found["drafting"]
    # The last round of each of the 3 pieces may give up to 3 tokens beyond it.
    assert 3 * 32 <= sum(drafting.steps_tokens) <= 3 * 35
    # Where the cache ends with the piece, its last rounds are shorter.
    assert max(drafting.steps_ms) == pytest.approx(round_ms(costs, 2, 3))


def test_pieces_are_of_the_text(tiny_bundle: Path, tmp_path: Path) -> None:
    model = ojfa_export.load(tiny_bundle)
    text = tmp_path / "text.txt"
    text.write_text("def main(argument):\n    return argument\n" * 50)
    ids = model.tokenizer.encode(text.read_text()).ids
    longest = model.manifest.cache.max_length - PIECE - 1
    if longest < 1:
        with pytest.raises(UsageError, match="prompt length"):
            cut_pieces(model, [text], 1, 100)
        return
    pieces = cut_pieces(model, [text, text], longest, 3 * PIECE)
    assert pieces.shape == (4, model.manifest.cache.max_length)
    assert pieces[0].tolist() == ids[: len(pieces[0])]
    assert pieces[1].tolist() == ids[-len(pieces[1]) :]
    np.testing.assert_array_equal(pieces[:2], pieces[2:])
    for length in (0, longest + 1):
        with pytest.raises(UsageError, match=f"prompt length {length} is outside 1..{longest}"):
            cut_pieces(model, [text], length, 100)


def test_texts_that_cannot_be_read(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="can't be read"):
        read_bundle(tiny_bundle, tmp_path / "none.txt", (), None, 1, 10, SILENT)
