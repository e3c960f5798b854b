"""The ONNX Runtime backend: a cache that stays in place, and blocks that are opened when used."""

from __future__ import annotations

import mmap
import os

import numpy as np
import onnx
import pytest
from chain import Chain, build_chain
from tiny_models import POSITIONS, VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_FP32

from ojfa_export import backends
from ojfa_export.backends.onnxruntime import executor as executor_module
from ojfa_export.backends.onnxruntime.build import build_engine
from ojfa_export.backends.onnxruntime.executor import Batch
from ojfa_export.backends.onnxruntime.session import open_session
from ojfa_export.backends.onnxruntime.slots import SlotArray
from ojfa_export.backends.onnxruntime.threads import (
    THREADS_VARIABLE,
    busy_cores,
    default_threads,
)
from ojfa_export.backends.passes import Chunk, row_ranges
from ojfa_export.bundle.names import block_name
from ojfa_export.errors import BackendError, UsageError
from ojfa_export.runtime.session import Session


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    directory = tmp_path_factory.mktemp("backend")
    checkpoint = make_checkpoint("llama-gqa", directory / "checkpoint", seed=11)
    return build_chain(checkpoint, directory, max_length=POSITIONS)


def addresses(session: Session) -> dict[int, tuple[int, int]]:
    executor = session._runner.executor
    return {block: tuple(a.ctypes.data for a in executor.cache(block)) for block in executor._cache}


def test_the_cache_stays_in_place(chain):
    session = chain.session(2)
    session.advance([[1, 2, 3, 4], [5, 6]])
    before = addresses(session)
    assert before.keys() == set(range(chain.spec.blocks))
    for tokens in ([[7], [8]], [[9], []], [[1, 2, 3], [4]], [[5], [6]]):
        session.advance(tokens)
    session.rewind(3, 0)
    session.advance([[7], [8]])
    assert addresses(session) == before


def test_a_step_writes_its_rows_and_no_others(chain):
    """Rows that hold a mark before a step hold it after, but for the one that the step adds."""
    session = chain.session(2)
    session.advance([[1, 2, 3, 4], [5, 6]])
    cache = {block: session._runner.executor.cache(block) for block in range(chain.spec.blocks)}
    for arrays in cache.values():
        for array in arrays:
            array[0, :, 4:] = array[1, :, 2:] = 1234.5
    kept = {block: [array.copy() for array in arrays] for block, arrays in cache.items()}
    session.advance([[7], [8]])
    for block, arrays in cache.items():
        for array, before in zip(arrays, kept[block], strict=True):
            changed = (array != before).any(axis=(1, 3))
            assert [np.flatnonzero(row).tolist() for row in changed] == [[4], [2]]


def test_a_decode_step_makes_no_array_and_no_binding(chain, monkeypatch):
    """Once its number of tokens has been seen: buffers and bindings are reused."""
    session = chain.session(2)
    session.advance([[1, 2], [3, 4]])
    session.advance([[5], [6]])

    def refuse(*args, **kwargs):
        raise AssertionError("a decode step made a new array or binding")

    monkeypatch.setattr(Batch, "_bind", refuse)
    monkeypatch.setattr(executor_module.np, "empty", refuse)
    session.advance([[7], [8]])
    session.advance([[9], [10]])
    with pytest.raises(AssertionError, match="new array or binding"):
        session.advance([[11], []])  # another number of tokens


@pytest.mark.parametrize("piece", [16, 17, 33])
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("limit", ["SCORE_BYTES", "PIECE"])
def test_prefill_in_pieces_is_prefill_at_once(chain, monkeypatch, rng, piece, before, limit):
    ids = rng.integers(VOCAB_SIZE, size=before + 50).tolist()
    expected = chain.session().advance(ids, every_position=True)[0][before:]
    per_token = 4 * chain.spec.heads * POSITIONS if limit == "SCORE_BYTES" else 1
    monkeypatch.setattr(executor_module, limit, piece * per_token)
    session, lengths, gave_back = chain.session(), [], []
    run = Batch.run

    def record(self, blocks, hidden, beside, options=None):
        lengths.extend([len(hidden)] * len(blocks))
        gave_back.append(options is executor_module.GIVING_BACK)
        return run(self, blocks, hidden, beside, options)

    session.advance(ids[:before])
    monkeypatch.setattr(Batch, "run", record)
    [logits] = session.advance(ids[before:], every_position=True)
    pieces = [min(piece, 50 - at) for at in range(0, 50, piece)]
    assert lengths == pieces * chain.spec.blocks
    assert gave_back == [False] * (len(gave_back) - 1) + [True]  # scratch memory, once
    np.testing.assert_allclose(logits, expected, atol=LOGITS_FP32, rtol=0)


@pytest.mark.parametrize(("slots", "together"), [(8, 64), (64, 32), (300, 8)])
def test_chunks_of_any_lengths_in_one_pass_are_each_alone(chain, rng, slots, together):
    """Steps, drafts, prompts and what is too long to be padded, after tokens of their own."""
    engines, blocks = chain.open_engines(), range(chain.spec.blocks)
    batched, alone = (engines.executor(slots, POSITIONS) for _ in range(2))
    assert batched._longest == together
    lengths = rng.permutation([1, 1, 5, 9, 20, together, 70]).tolist()
    starts = rng.integers(0, 30, size=len(lengths)).tolist()
    order = rng.permutation(slots)[: len(lengths)].tolist()
    for part in (
        [Chunk(slot, 0, start) for slot, start in zip(order, starts, strict=True) if start],
        [Chunk(*chunk) for chunk in zip(order, starts, lengths, strict=True)],
    ):
        rows = sum(chunk.length for chunk in part)
        hidden = rng.normal(size=(rows, chain.spec.hidden_size)).astype(np.float32)
        found = batched.run(blocks, hidden, part, long_context=False)
        for chunk, own in zip(part, row_ranges(part), strict=True):
            expected = alone.run(blocks, hidden[own.start : own.stop], [chunk], long_context=False)
            np.testing.assert_allclose(
                found[own.start : own.stop], expected, atol=LOGITS_FP32, rtol=0
            )


def test_a_released_slot_is_lost_and_others_stay():
    """Pages that still held what was in them would still be the process's."""
    slots = SlotArray((3, 5000))
    slots.array[...] = 1
    slots.release(1)
    page = mmap.PAGESIZE // 4
    assert not slots.array[1, page:-page].any()
    assert (slots.array[[0, 2]] == 1).all()


def test_blocks_past_a_fixed_exit_are_never_loaded(chain):
    engines = chain.open_engines()
    assert not engines._sessions
    engines.load_blocks(2)
    assert engines._sessions.keys() == {"embed", "block_00", "block_01"}
    session = Session(chain.spec, engines, 1, POSITIONS)
    session.advance([1, 2, 3], 2)
    for token in range(4):
        session.advance([token], 1 + token % 2)
    assert engines._sessions.keys() == {"embed", "block_00", "block_01", "exit_head"}
    assert session._runner.executor._cache.keys() == {0, 1}
    session.advance([5])
    assert engines._sessions.keys() == chain.engine_files.keys()


def test_sessions_of_one_model_share_its_engines_and_nothing_else(chain):
    first, second = chain.session(), chain.session()
    expected = chain.session().advance([4, 5, 6])
    first.advance([1, 2, 3])
    second.advance([4])
    first.advance([9])
    np.testing.assert_allclose(second.advance([5, 6]), expected, atol=LOGITS_FP32, rtol=0)


def test_an_unknown_backend():
    with pytest.raises(UsageError, match="backend 'tpu' is not known") as error:
        backends.load("tpu")
    assert "onnxruntime" in error.value.hint


def test_a_backend_whose_sdk_is_missing(monkeypatch):
    monkeypatch.setitem(backends.PACKAGES, "absent", "ojfa_export.backends.absent.backend")
    with pytest.raises(BackendError, match="backend 'absent' can't be used") as error:
        backends.load("absent")
    assert "doctor" in error.value.hint


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "fits"),
    [(16, 16, True), (80, 32, True), (24, 24, False), (32, 8, False), (8, 0, True), (12, 0, False)],
)
def test_head_sizes_that_the_fused_attention_takes(chain, tmp_path, head_dim, rotary_dim, fits):
    """Refused when the engine is built, not when a user runs it."""
    spec = chain.spec.model_copy(update={"head_dim": head_dim, "rotary_dim": rotary_dim})
    graph, engine = chain.graphs / "final_head.onnx", tmp_path / "engine.onnx"
    if fits:
        build_engine(spec, graph, engine)
        assert onnx.load(engine, load_external_data=False).graph.name == "final_head"
    else:
        with pytest.raises(BackendError, match=f"head size {head_dim}"):
            build_engine(spec, graph, engine)
        assert not engine.exists()


def test_an_engine_that_cannot_be_opened(chain):
    whole = chain.engine_files[block_name(0)].read_bytes()
    with pytest.raises(BackendError, match="can't open 'block_00'") as error:
        open_session(whole[: len(whole) // 2], block_name(0), chain.graphs)
    assert "\n" not in error.value.message


def test_weights_that_are_missing(chain, tmp_path):
    whole = chain.engine_files[block_name(0)].read_bytes()
    with pytest.raises(BackendError, match="can't open 'block_00'"):
        open_session(whole, block_name(0), tmp_path)


def test_threads(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    assert 1 <= default_threads() <= cores
    monkeypatch.setenv(THREADS_VARIABLE, "3")
    assert default_threads() == 3
    for wrong in ("0", "-1", "two", "1.5", "1024000", "\u0663", "9" * 5000):
        monkeypatch.setenv(THREADS_VARIABLE, wrong)
        with pytest.raises(UsageError, match=THREADS_VARIABLE):
            default_threads()


@pytest.mark.parametrize(
    ("pressure", "loadavg", "busy"),
    [
        ("some avg10=0.12 avg60=1.00 avg300=1.00 total=9", "3.10 2.50 2.00 4/113 7616", 0),
        ("some avg10=91.29 avg60=9.00 avg300=1.00 total=9", "3.10 2.50 2.00 4/113 7616", 3),
        ("some avg10=91.29 avg60=9.00 avg300=1.00 total=9", "3.10 2.50 2.00 1/113 7616", 0),
        ("", "3.10 2.50 2.00 4/113 7616", 0),
        ("some avg10=much", "3.10 2.50 2.00 4/113 7616", 0),
        (None, None, 0),
    ],
)
def test_cores_that_others_keep_busy(tmp_path, pressure, loadavg, busy):
    if pressure is not None:
        (tmp_path / "pressure").mkdir()
        (tmp_path / "pressure" / "cpu").write_text(pressure)
        (tmp_path / "loadavg").write_text(loadavg)
    assert busy_cores(tmp_path) == busy
