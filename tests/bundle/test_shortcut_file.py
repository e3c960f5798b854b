from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from chain import random_mlp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ojfa_export.bundle.shortcut_file import load, save
from ojfa_export.errors import OjfaError
from ojfa_export.models.spec import ModelSpec

SHA = "0123456789abcdef" * 4


@pytest.fixture
def saved(random_shortcut, tmp_path):
    shortcut = random_shortcut(10, 3)
    path = tmp_path / "shortcut.safetensors"
    save(shortcut, path, SHA)
    return shortcut, path


def rewrite(path, tensors=None, metadata=None):
    """The same file with some tensors or metadata replaced, or left out where None."""
    with safe_open(path, framework="numpy") as file:
        merged = {**file.metadata(), **(metadata or {})}
    arrays = {**load_file(path), **(tensors or {})}
    save_file(
        {name: array for name, array in arrays.items() if array is not None},
        path,
        {name: value for name, value in merged.items() if value is not None},
    )


@pytest.mark.parametrize("residual", [False, True])
def test_round_trip(random_shortcut, tmp_path, residual):
    shortcut = replace(random_shortcut(10, 3, fitted_at=7, residual=residual), kind="ojfa")
    save(shortcut, tmp_path / "s", SHA)
    loaded, sha = load(tmp_path / "s")
    assert sha == SHA
    for name in ("kind", "fitted_at", "residual", "rank", "hidden_size"):
        assert getattr(loaded, name) == getattr(shortcut, name)
    for name in ("scale", "shift", "down", "up"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(shortcut, name))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_others_read_the_file_by_its_contract(saved):
    shortcut, path = saved
    tensors = load_file(path)
    assert {name: (a.shape, a.dtype.name) for name, a in tensors.items()} == {
        "scale": ((10,), "float32"),
        "shift": ((10,), "float32"),
        "down": ((10, 3), "float32"),
        "up": ((3, 10), "float32"),
    }
    np.testing.assert_array_equal(tensors["up"], shortcut.up)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {
            "kind": "n-njtc",
            "rank": "3",
            "fitted_at": "3",
            "residual": "false",
            "model_sha256": SHA,
            "format_version": "1",
        }


def test_same_shortcut_same_bytes(saved, tmp_path):
    shortcut, path = saved
    save(shortcut, tmp_path / "again", SHA)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_failed_save_leaves_the_old_file(saved, monkeypatch, tmp_path):
    shortcut, path = saved
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(replace(shortcut, fitted_at=9), path, SHA)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "6"}, "format version '6'"),
        ({"format_version": "2"}, "lacks gates"),
        ({"format_version": None}, "lacks format_version"),
        ({"model_sha256": None, "kind": None}, "lacks kind, model_sha256"),
        ({"rank": "4"}, "metadata says rank 4, down has 3"),
        ({"rank": "many"}, "not a valid shortcut"),
        ({"fitted_at": "0"}, "fitted_at is 0"),
        ({"residual": "yes"}, "residual is 'yes'"),
        ({"model_sha256": "beef"}, "64 lower-case hex digits"),
        ({"kind": ""}, "kind is empty"),
    ],
)
def test_wrong_metadata_is_refused(saved, metadata, message):
    rewrite(saved[1], metadata=metadata)
    with pytest.raises(OjfaError, match=message) as caught:
        load(saved[1])
    assert str(saved[1]) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up": None}, "lacks up"),
        ({"extra": np.zeros(1, np.float32)}, "unknown tensors: extra"),
        ({"scale": np.zeros(9, np.float32)}, r"scale has shape \[9\], expected \[10\]"),
        ({"up": np.zeros((10, 3), np.float32)}, r"up has shape \[10, 3\], expected \[3, 10\]"),
        ({"down": np.zeros(10, np.float32)}, "down has shape"),
        ({"down": np.zeros((10, 11), np.float32)}, r"rank 11 is outside 1\.\.10"),
        ({"down": np.zeros((10, 0), np.float32)}, r"rank 0 is outside 1\.\.10"),
        ({"shift": np.zeros(10, np.float64)}, "shift is float64"),
        ({"shift": np.full(10, np.nan, np.float32)}, "shift has values that are NaN"),
        ({"up": np.full((3, 10), np.inf, np.float32)}, "up has values that are NaN or infinite"),
    ],
)
def test_wrong_tensors_are_refused(saved, tensors, message):
    rewrite(saved[1], tensors=tensors)
    with pytest.raises(OjfaError, match=message):
        load(saved[1])


def test_missing_empty_or_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no tensors here, only a line of text")
    header = b'{"scale":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    (tmp_path / "bf16").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    for name in ("absent", "empty", "text", "bf16", "."):
        with pytest.raises(OjfaError):
            load(tmp_path / name)


def test_no_damage_to_the_file_ends_in_another_error(saved, rng):
    _, path = saved
    good = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    assert json.loads(good[8:header_end])["__metadata__"]["kind"] == "n-njtc"
    for trial in range(300):
        damaged = bytearray(good)
        if trial % 3 == 0:
            del damaged[rng.integers(len(good)) :]
        else:
            # A flipped bit in a weight is for the bundle's checksums to find.
            damaged[rng.integers(header_end)] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with contextlib.suppress(OjfaError):  # any other error fails the test
            load(path)


def test_digest_of_the_model_must_be_one(saved, tmp_path):
    with pytest.raises(ValueError, match="64 lower-case hex"):
        save(saved[0], tmp_path / "other", "not a digest")


def test_number_of_parameters_is_the_papers(random_shortcut):
    assert random_shortcut(1600, 16).parameters == 2 * 1600 * 16 + 2 * 1600


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_apply_follows_the_formula_on_any_leading_shape(random_shortcut, rng, dtype):
    shortcut = random_shortcut(6, 2, residual=True)
    h = rng.normal(size=(2, 3, 6)).astype(dtype)
    y = shortcut.apply(h)
    assert y.shape == h.shape
    assert y.dtype == (np.float64 if dtype == np.float64 else np.float32)
    wide = h.astype(np.float64)
    s, t, d, u = (
        getattr(shortcut, name).astype(np.float64) for name in ("scale", "shift", "down", "up")
    )
    expected = np.einsum("abh,hr,rk->abk", wide * s + t, d, u) + wide
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def mlp(rng):
    spec = ModelSpec.model_construct(
        blocks=4, hidden_size=10, norm="rms", norm_epsilon=1e-6, activation="silu", gated=True
    )
    return random_mlp(spec, 8, int(rng.integers(2**31)))


def test_an_mlp_round_trips(mlp, tmp_path):
    save(mlp, tmp_path / "s", SHA)
    loaded, sha = load(tmp_path / "s")
    assert sha == SHA
    for name in ("kind", "norm", "epsilon", "activation", "gate", "width", "exits", "parameters"):
        assert getattr(loaded, name) == getattr(mlp, name)
    for name in ("scale", "shift", "up", "down"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(mlp, name))
    save(mlp, tmp_path / "again", SHA)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ojfa"}, "kind is 'ojfa', expected mlp"),
        ({"norm": "none"}, "norm is 'none', expected rms or layer"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"gate": "false"}, r"up has shape \[10, 16\], expected \[10, 8\]"),
        ({"epsilon": "nan"}, "epsilon is nan"),
        ({"epsilon": "small"}, "not a valid shortcut"),
        ({"epsilon": None}, "lacks epsilon"),
        ({"up": np.zeros((10, 15), np.float32)}, r"up has shape \[10, 15\]"),
        (
            {"shift": np.zeros((4, 10), np.float32)},
            r"shift has shape \[4, 10\], expected \[3, 10\]",
        ),
        ({"scale": np.zeros((3, 10), np.float16)}, "scale is float16"),
        ({"down": np.full((8, 10), np.nan, np.float32)}, "down has values that are NaN"),
        ({"down": np.zeros(10, np.float32)}, "expected two axes"),
    ],
)
def test_a_damaged_mlp_is_refused(mlp, tmp_path, changes, message):
    path = tmp_path / "s"
    save(mlp, path, SHA)
    tensors = {name: each for name, each in changes.items() if isinstance(each, np.ndarray)}
    rewrite(path, tensors, {n: each for n, each in changes.items() if n not in tensors})
    with pytest.raises(OjfaError, match=message) as caught:
        load(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"), [("blocks", 5), ("hidden_size", 11), ("norm", "layer"), ("gated", False)]
)
def test_an_mlp_of_another_kind_of_model_does_not_fit(mlp, field, value):
    fields = {"blocks": 4, "hidden_size": 10, "norm": "rms", "norm_epsilon": 1e-6}
    spec = ModelSpec.model_construct(**fields, activation="silu", gated=True)
    mlp.check_fits(spec)
    with pytest.raises(ValueError, match="the model's"):
        mlp.check_fits(spec.model_copy(update={field: value}))
