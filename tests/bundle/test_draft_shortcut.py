from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from drafts import by_torch, random_draft
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tolerances import DRAFT_ROTATIONS

from ojfa_export.bundle.shortcut_file import load, load_exit, save
from ojfa_export.errors import OjfaError
from ojfa_export.models.spec import ModelSpec

SHA = "0123456789abcdef" * 4


@pytest.fixture(params=[True, False], ids=["own head", "model's head"])
def draft(request, rng):
    return random_draft(seed=int(rng.integers(2**31)), own_head=request.param)


def test_a_window_is_what_torch_makes_of_it(draft, rng):
    memory, embeddings = rng.normal(size=(2, 9, 16))
    outputs, _ = draft.apply(memory, embeddings)
    expected = by_torch(draft, memory, embeddings)
    assert np.abs(outputs - expected).max() < DRAFT_ROTATIONS * np.abs(expected).max()


def test_steps_one_by_one_are_the_window(draft, rng):
    memory, embeddings = rng.normal(size=(2, 9, 16))
    whole, (keys, values) = draft.apply(memory, embeddings)
    past, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        part, past = draft.apply(memory[start:stop], embeddings[start:stop], past)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-12)
    np.testing.assert_allclose(past[0], keys, atol=1e-12)
    np.testing.assert_allclose(past[1], values, atol=1e-12)


def test_no_position_sees_a_later_one(draft, rng):
    memory, embeddings = rng.normal(size=(2, 9, 16))
    before, _ = draft.apply(memory, embeddings)
    memory[6:] += 1
    after, _ = draft.apply(memory, embeddings)
    np.testing.assert_array_equal(before[:6], after[:6])
    assert np.abs(before[6:] - after[6:]).max() > 0.1


def test_memory_and_logits_follow_the_formula(draft, rng):
    states, y = rng.normal(size=(5, 48)), rng.normal(size=(5, 16))
    np.testing.assert_allclose(draft.memory(states), states @ draft.fuse.astype(float))
    model_head = rng.normal(size=(40, 16))
    head = model_head if draft.head is None else draft.head.astype(float)
    normed = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * draft.final_norm
    np.testing.assert_allclose(draft.logits(y, model_head), normed @ head.T)
    assert draft.logits(y.astype(np.float32), model_head).dtype == np.float32


def test_round_trip_and_same_bytes(draft, tmp_path):
    save(draft, tmp_path / "s", SHA)
    loaded, sha = load(tmp_path / "s")
    assert sha == SHA
    for field in fields(draft):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(draft, field.name))
    save(loaded, tmp_path / "again", SHA)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()
    with safe_open(tmp_path / "s", framework="numpy") as file:
        assert file.metadata()["format_version"] == "4"
        assert file.metadata()["depths"] == "1,2,4"
        stored = sum(file.get_tensor(name).size for name in file.keys() if name != "tokens")  # noqa: SIM118
    assert stored == draft.parameters


def test_where_a_jump_of_exits_is_needed_it_is_refused(draft, tmp_path):
    save(draft, tmp_path / "s", SHA)
    with pytest.raises(OjfaError, match="is a draft layer"):
        load_exit(tmp_path / "s")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mlp"}, "kind is 'mlp', expected draft"),
        ({"depths": "2,1,4"}, r"depths are \[2, 1, 4\], expected rising"),
        ({"depths": "0,1,4"}, "expected rising numbers from 1 on"),
        ({"depths": "1,4"}, r"fuse has shape \[48, 16\], expected \[32, 16\]"),
        ({"depths": "many"}, "not a valid shortcut"),
        ({"heads": "5"}, "5 heads can't share 2"),
        ({"head_dim": "3"}, "head_dim is 3"),
        ({"rope_theta": "nan"}, "rope_theta is nan"),
        ({"epsilon": "1"}, "epsilon is 1.0"),
        ({"heads": None}, "lacks heads"),
        ({"qkv": None}, "lacks qkv"),
        ({"tokens": None}, "head and tokens go together"),
        ({"tokens": np.arange(20, dtype=np.int64)}, "tokens are int64"),
        ({"tokens": np.zeros(20, np.int32)}, "tokens must rise"),
        ({"tokens": np.arange(19, dtype=np.int32)}, r"tokens are int32 \[19\], expected int32"),
        ({"qkv": np.zeros((16, 48), np.float32)}, r"qkv has shape \[16, 48\]"),
        ({"down": np.full((24, 16), np.nan, np.float32)}, "down has values that are NaN"),
        ({"extra": np.zeros(1, np.float32)}, "unknown tensors: extra"),
    ],
)
def test_a_damaged_one_is_refused(tmp_path, changes, message):
    path = tmp_path / "s"
    save(random_draft(), path, SHA)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    for name, value in changes.items():
        (metadata if name in metadata else arrays)[name] = value
    save_file(
        {name: array for name, array in arrays.items() if array is not None},
        path,
        {name: value for name, value in metadata.items() if value is not None},
    )
    with pytest.raises(OjfaError, match=message) as caught:
        load(path)
    assert caught.value.hint


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 8), ("blocks", 3), ("vocab_size", 9)])
def test_of_another_kind_of_model_it_does_not_fit(field, value):
    spec = ModelSpec.model_construct(hidden_size=16, blocks=4, vocab_size=40)
    random_draft().check_fits(spec)
    with pytest.raises(ValueError, match=r"the model|the model's"):
        random_draft().check_fits(spec.model_copy(update={field: value}))


def test_fields_are_checked_where_they_are_given():
    with pytest.raises(ValueError, match="go together"):
        replace(random_draft(), head=None)
