"""Statistics against the runtime, their file, and confidences in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tolerances import LOGITS_FP32

from ojfa_export import backends
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.errors import BundleError, CalibrationError
from ojfa_export.promises.collect import collect_statistics, compare, sample_places
from ojfa_export.promises.measures import MEASURES, confidences, round_down, round_up
from ojfa_export.promises.statistics import ExitStatistics, load_statistics, save_statistics
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import SILENT

Population = Callable[..., ExitStatistics]
FLOATS = hnp.arrays(np.float32, 20, elements=st.floats(-1000, 1000, width=32))


@given(FLOATS)
def test_rounding_keeps_comparisons(values: np.ndarray) -> None:
    down, up = round_down(values), round_up(values)
    assert (down <= values).all()
    assert (up >= values).all()
    for threshold in down.astype(np.float32):
        assert ((down >= threshold) == (values >= threshold)).all()


def test_confidences_in_float64(rng: np.random.Generator) -> None:
    logits = (4 * rng.normal(size=(50, 70))).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=1, keepdims=True)
    ordered = np.sort(exact, axis=1)
    expected = [
        ordered[:, -1],
        ordered[:, -1] - ordered[:, -2],
        (exact * np.log(exact)).sum(axis=1),
    ]
    np.testing.assert_allclose(confidences(logits), expected, atol=LOGITS_FP32)


def test_ties_are_not_sure() -> None:
    top, margin, entropy = confidences(np.array([[2, 2, -50, -50]], np.float32))
    assert top == pytest.approx(0.5)
    assert margin == 0
    assert entropy == pytest.approx(-np.log(2))


def test_extra_surprisal_in_float64(rng: np.random.Generator) -> None:
    logits = (4 * rng.normal(size=(40, 60))).astype(np.float32)
    tokens = rng.integers(0, 60, (40, 3))
    agrees, extra = compare(logits, tokens)
    exact = np.exp(logits.astype(np.float64))
    log_probs = np.log(exact / exact.sum(axis=1, keepdims=True))
    expected = log_probs.max(axis=1)[:, None] - np.take_along_axis(log_probs, tokens, axis=1)
    np.testing.assert_array_equal(agrees, tokens == log_probs.argmax(axis=1)[:, None])
    np.testing.assert_allclose(extra, expected, rtol=2e-3, atol=1e-5)
    assert (extra.astype(np.float64) >= expected - 1e-5).all()


def collect(
    bundle: Path,
    windows: list[np.ndarray],
    scratch: Path,
    only: tuple[int, ...] | None = None,
) -> ExitStatistics:
    opened, backend = Bundle(bundle), backends.load("onnxruntime")
    files = opened.engines("onnxruntime").files
    rotary = opened.manifest.rotary
    tables = rotary and (opened.tensor(rotary.cos), opened.tensor(rotary.sin))
    return collect_statistics(
        opened.manifest.model.spec,
        lambda: backend.open_engines(
            opened.manifest.model.spec,
            opened.graphs,
            {name: bundle / file for name, file in files.items()},
            tables,
        ),
        [f"d{index}" for index in range(len(windows))],
        windows,
        scratch,
        SILENT,
        np.random.default_rng(0),
        only=only,
    )


def test_what_the_runtime_says_token_by_token(
    tiny_bundle: Path, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = Model(Bundle(tiny_bundle), "onnxruntime")
    blocks = Bundle(tiny_bundle).manifest.model.spec.blocks
    vocabulary = Bundle(tiny_bundle).manifest.model.spec.vocab_size
    windows = [rng.integers(0, vocabulary, (count, 12)).astype(np.int32) for count in (2, 1)]
    found = collect(tiny_bundle, windows, tmp_path)
    assert found.exits == tuple(range(1, blocks))
    assert found.domain.tolist() == [0, 0, 1]
    assert found.tokens_per_window == 12  # as many as there are
    assert not list(tmp_path.iterdir())
    some, expected = collect(tiny_bundle, windows, tmp_path, (1, 3)), found.at((1, 3))
    assert some.exits == expected.exits
    for array in ("confidence", "agrees", "extra_surprisal"):
        np.testing.assert_array_equal(getattr(some, array), getattr(expected, array))
    for index, window in enumerate(np.concatenate(windows)):
        said = {}
        for depth in (*found.exits, blocks):
            session = model.session()
            exit_ = "full" if depth == blocks else depth
            said[depth] = np.stack([session.advance([int(t)], exit=exit_)[0] for t in window])
        choice = said[blocks].argmax(axis=1)
        for column, depth in enumerate(found.exits):
            tokens = said[depth].argmax(axis=1)
            np.testing.assert_array_equal(found.agrees[index, :, column], tokens == choice)
            for measure, values in zip(MEASURES, confidences(said[depth]), strict=True):
                np.testing.assert_allclose(
                    found.of(measure)[index, :, column], values, rtol=2e-3, atol=LOGITS_FP32
                )


def test_engines_that_give_nan_are_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ojfa_export.backends.onnxruntime.engines import OnnxRuntimeEngines

    monkeypatch.setattr(
        OnnxRuntimeEngines,
        "logits",
        lambda self, h, final: np.full((len(h), 9), np.nan, np.float32),
    )
    with pytest.raises(CalibrationError, match="exit head's logits hold NaN"):
        collect(tiny_bundle, [np.zeros((1, 4), np.int32)], tmp_path)


@pytest.mark.parametrize("exits", [(4, 8, 10), (8,), ()])
def test_file_round_trip(exits: tuple[int, ...], population: Population, tmp_path: Path) -> None:
    splits = {"tuning": population(windows=5), "certification": population(windows=7).at(exits)}
    for name in ("a.npz", "b.npz"):
        save_statistics(tmp_path / name, splits)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = load_statistics(tmp_path / "a.npz")
    for name, expected in splits.items():
        assert found[name].exits == expected.exits
        assert found[name].domains == expected.domains
        assert found[name].blocks == expected.blocks
        for array in ("domain", "confidence", "agrees", "extra_surprisal"):
            np.testing.assert_array_equal(getattr(found[name], array), getattr(expected, array))


def test_files_that_are_no_statistics(population: Population, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(BundleError, match="has no calibration statistics") as caught:
        load_statistics(path)
    assert "ojfa-export build" in str(caught.value.hint)
    save_statistics(path, {name: population(windows=3) for name in ("tuning", "certification")})
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[:-300], whole[:200] + bytes(64) + whole[264:]):
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"statistics\.npz is damaged"):
            load_statistics(path)
    with path.open("wb") as file:
        np.savez(file, exits=np.arange(3))
    with pytest.raises(BundleError, match="is damaged"):
        load_statistics(path)


def test_shapes_must_fit(population: Population) -> None:
    plain = population(windows=3)
    with pytest.raises(ValueError, match="do not fit"):
        ExitStatistics(
            12, (4, 8), plain.domains, plain.domain, plain.confidence, plain.agrees,
            plain.extra_surprisal,
        )  # fmt: skip


@pytest.mark.parametrize("length", [65, 100, 512])
def test_sampled_places_are_all_as_likely(rng: np.random.Generator, length: int) -> None:
    count = 20_000
    places, run = sample_places(rng, count, length)
    assert places.shape == (count, 64)
    assert run == 8
    assert all(len(set(row)) == 64 for row in places[:200].tolist())
    half = length // 2 if length == 512 else length
    assert (places // half == places[:, :1] // half).all()
    steps = np.diff(places.reshape(count, -1, run), axis=2) % half
    assert (steps == 1).all()
    shares = np.bincount(places.ravel(), minlength=length) / count
    expected = 64 / length
    # Six standard errors of a binomial share.
    assert abs(shares - expected).max() < 6 * np.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("length", [1, 12, 64])
def test_short_windows_are_sampled_whole(rng: np.random.Generator, length: int) -> None:
    places, run = sample_places(rng, 3, length)
    np.testing.assert_array_equal(places, np.tile(np.arange(length), (3, 1)))
    assert run == length


def test_neighbours_are_counted(population: Population, rng: np.random.Generator) -> None:
    plain = replace(population(windows=5, tokens=24), run=6)
    chosen = rng.random((10, 24)) < 0.6
    expected = [
        np.mean([row[i] and row[i + 1] for i in range(23) if i % 6 != 5]) for row in chosen.tolist()
    ]
    np.testing.assert_allclose(plain.neighbours(chosen), expected)
    alone = replace(plain, run=1)
    np.testing.assert_allclose(alone.neighbours(chosen), chosen.mean(axis=1) ** 2)
    with pytest.raises(ValueError, match="do not fit"):
        replace(plain, run=7)
