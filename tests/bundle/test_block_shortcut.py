from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ojfa_export.bundle.block_shortcut import (
    AFTER_NORMS,
    BIASES,
    KEY_NORM,
    QUERY_NORM,
    WEIGHTS,
    BlockShortcut,
)
from ojfa_export.bundle.shortcut_file import load, load_exit, save
from ojfa_export.errors import OjfaError

SHA = "0123456789abcdef" * 4
SHAPES = {
    "attention.norm": (16,),
    "attention.qkv": (16, 48),
    "attention.out": (20, 16),
    "mlp.norm": (16,),
    "mlp.up": (16, 40),
    "mlp.down": (20, 16),
}


def random_block(
    rng: np.random.Generator, exits: tuple[int, ...] = (1, 4), blocks: int = 2, biases: bool = True
) -> BlockShortcut:
    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    weights = {name: normal(blocks, *SHAPES[name.rpartition(".")[0]]) for name in WEIGHTS}
    if biases:
        weights |= {name: normal(blocks, SHAPES[name.rpartition(".")[0]][-1]) for name in BIASES}
    return BlockShortcut(exits, normal(len(exits), 16), normal(len(exits), 16), weights)


@pytest.mark.parametrize(("blocks", "biases"), [(1, True), (2, False)])
def test_round_trip_and_same_bytes(blocks, biases, rng, tmp_path):
    block = random_block(rng, blocks=blocks, biases=biases)
    save(block, tmp_path / "s", SHA)
    loaded, sha = load(tmp_path / "s")
    assert isinstance(loaded, BlockShortcut)
    assert sha == SHA
    assert loaded.exits == (1, 4)
    assert loaded.weights.keys() == block.weights.keys()
    for name, weight in block.weights.items():
        np.testing.assert_array_equal(loaded.weights[name], weight)
    for name in ("scale", "shift"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(block, name))
    save(loaded, tmp_path / "again", SHA)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "s").read_bytes()
    with safe_open(tmp_path / "s", framework="numpy") as file:
        assert file.metadata()["format_version"] == "5"
        assert sum(file.get_tensor(name).size for name in file.keys()) == block.parameters  # noqa: SIM118
    assert load_exit(tmp_path / "s")[0].exits == (1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mlp"}, "kind is 'mlp', expected block"),
        ({"exits": "4,1"}, r"exits are \[4, 1\], expected rising"),
        ({"exits": "0,1"}, "expected rising numbers from 1 on"),
        ({"exits": "1,2,3"}, "there are 2 blocks for 3 exits"),
        ({"exits": "some"}, "not a valid shortcut"),
        ({"exits": None}, "lacks exits"),
        ({"mlp.up.weight": None}, "lacks mlp.up.weight"),
        ({"scale": np.zeros((3, 16), np.float32)}, r"scale has shape \[3, 16\]"),
        ({"mlp.up.weight": np.zeros((2, 15, 40), np.float32)}, r"mlp.up.weight has shape"),
        ({"mlp.down.weight": np.zeros((20, 16), np.float32)}, "expected 3 axes"),
        ({"mlp.up.bias": np.zeros((2, 41), np.float32)}, r"mlp.up.bias has shape \[2, 41\]"),
        ({"mlp.norm.weight": np.full((2, 16), np.nan, np.float32)}, "values that are NaN"),
        ({"extra": np.zeros(1, np.float32)}, "unknown tensors: extra"),
    ],
)
def test_a_damaged_one_is_refused(changes, message, rng, tmp_path):
    path = tmp_path / "s"
    save(random_block(rng), path, SHA)
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


def test_norms_of_queries_and_keys_and_those_after_are_in_the_file(rng, tmp_path):
    block = random_block(rng)
    names = {QUERY_NORM: 4, KEY_NORM: 4, **dict.fromkeys(AFTER_NORMS, 16)}
    more = {name: rng.normal(size=(2, width)).astype(np.float32) for name, width in names.items()}
    save(replace(block, weights={**block.weights, **more}), tmp_path / "s", SHA)
    loaded, _ = load(tmp_path / "s")
    for name, weight in more.items():
        np.testing.assert_array_equal(loaded.weights[name], weight)


def test_an_exit_that_it_does_not_serve(rng):
    with pytest.raises(ValueError, match=r"the jump serves exits \[1, 4\], not 2"):
        random_block(rng).apply(np.zeros((3, 16)), 2, None, ())


def test_weights_that_are_no_blocks(rng):
    block = random_block(rng)
    with pytest.raises(ValueError, match="weights are"):
        BlockShortcut((1, 4), block.scale, block.shift, {})
