"""What a user may ask of a build."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_checkpoint

from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import plan
from ojfa_export.compiler.settings import decide, read_recipe, recipes_directory
from ojfa_export.errors import CheckpointError, OjfaError, UsageError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint

Options = Callable[..., Any]
RECIPES = sorted(recipes_directory().glob("*.toml"))
RECIPE = """
rank = 4
precision = "fp16"
calibration_tokens = 2048
window = 32
max_cache_length = 96
max_batch_size = 3
[model]
hub_id = "tiny/llama"
family = "llama"
hidden_size = 64
blocks = 4
"""


def refused(options: Options, match: str, **changes: Any) -> OjfaError:
    """All that is refused is refused before anything is written."""
    with pytest.raises(UsageError, match=match) as caught:
        plan(options(**changes))
    assert caught.value.hint
    assert not list(options().output.parent.glob("out.ojfa*"))
    return caught.value


@pytest.mark.parametrize("rank", [0, -1, 65])
def test_rank_out_of_range(options: Options, rank: int) -> None:
    refused(options, f"rank {rank} is outside 1..64", rank=rank)


@pytest.mark.parametrize("rank", [1, 64])
def test_extreme_ranks(options: Options, rank: int) -> None:
    assert plan(options(rank=rank))["settings"]["rank"] == rank


@pytest.mark.parametrize("value", [0, -5])
@pytest.mark.parametrize("name", ["max_cache_length", "max_batch_size", "calibration_tokens"])
def test_numbers_below_one(options: Options, name: str, value: int) -> None:
    refused(options, f"{name.replace('_', '-')} must be 1 or more, not {value}", **{name: value})


def test_cache_longer_than_the_models_positions(options: Options) -> None:
    error = refused(options, "129 is more than the 128 positions", max_cache_length=129)
    assert "--max-cache-length 128" in str(error.hint)
    assert plan(options(max_cache_length=128))["settings"]["max_cache_length"] == 128


def test_dynamic_scaling_ends_at_the_trained_length(options: Options, tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint("llama-rope-dynamic", tmp_path / "dynamic", seed=1))
    settings = plan(options(checkpoint=checkpoint, max_cache_length=None))["settings"]
    assert settings["max_cache_length"] == settings["window"] == 32
    match = "33 is more than the 32 positions up to which dynamic rotary scaling"
    error = refused(options, match, checkpoint=checkpoint, max_cache_length=33)
    assert "--max-cache-length 32 or less" in str(error.hint)


def test_unknown_precision_and_backend(options: Options) -> None:
    error = refused(options, "precision 'int8' is not known", precision="int8")
    assert "fp32, fp16, bf16" in str(error.hint)
    refused(options, "backend 'none' is not known", backend="none")


def test_defaults(options: Options) -> None:
    settings = plan(options(rank=None, max_cache_length=None, calibration_tokens=None))["settings"]
    assert settings["rank"] == 1  # floor(64 / 100), but at least 1
    assert settings["precision"] == "fp32"
    assert settings["max_cache_length"] == 128
    assert settings["window"] == 128


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_ship(path: Path) -> None:
    recipe = read_recipe(path.stem)
    assert recipe == read_recipe(str(path))
    assert recipe.rank == recipe.model.hidden_size // 100
    assert recipe.calibration_tokens >= 2 * recipe.model.hidden_size / 0.75


def test_a_recipe_ships_for_each_model_of_the_paper() -> None:
    assert {path.stem for path in RECIPES} == {"gpt2-xl", "llama-2-7b", "phi-3-mini"}


def test_recipe_and_what_overrides_it(options: Options, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    unset = {"rank": None, "max_cache_length": None, "calibration_tokens": None}
    settings = plan(options(**unset, recipe=str(recipe)))["settings"]
    assert settings["rank"] == 4
    assert settings["precision"] == "fp16"
    assert (settings["max_cache_length"], settings["max_batch_size"]) == (96, 3)
    assert (settings["calibration_tokens"], settings["window"]) == (2048, 32)
    changes = {**unset, "rank": 5, "precision": "fp32", "max_batch_size": 7}
    settings = plan(options(**changes, recipe=str(recipe)))["settings"]
    assert (settings["rank"], settings["precision"]) == (5, "fp32")
    assert (settings["max_batch_size"], settings["max_cache_length"]) == (7, 96)
    refused(options, "rank 0 is outside", **{**unset, "rank": 0}, recipe=str(recipe))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("rank = 4", "rank = 65", "rank 65 is outside 1..64"),
        ("rank = 4", "rank = 0", "tiny.toml: rank: "),
        ("rank = 4", "", "tiny.toml: rank: Field required"),
        ("rank = 4", "rank = 4\nranks = 4", "tiny.toml: ranks: Extra inputs"),
        ("blocks = 4", "blocks = 4\nheads = 4", "tiny.toml: model.heads: Extra inputs"),
        ('"fp16"', '"int4"', "tiny.toml: precision: "),
        ("rank = 4", "rank = ", "tiny.toml is not TOML"),
        ("hidden_size = 64", "hidden_size = 65", "with hidden size 65; this checkpoint has 64"),
        ('"llama"', '"gpt2"', "with family gpt2; this checkpoint has llama"),
        ("= 96", "= 4096", "4096 is more than the 128 positions"),
    ],
)
def test_bad_recipe(options: Options, tmp_path: Path, old: str, new: str, match: str) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.replace(old, new))
    changes = {"rank": None, "max_cache_length": None, "calibration_tokens": None}
    refused(options, match, **changes, recipe=str(recipe))


def test_recipe_that_is_not_there(options: Options, tmp_path: Path) -> None:
    error = refused(options, "recipe 'gpt3' is not known", recipe="gpt3")
    assert "gpt2-xl" in str(error.hint)
    refused(options, "is for openai-community/gpt2-xl with family gpt2", recipe="gpt2-xl")
    (tmp_path / "directory.toml").mkdir()
    refused(options, "can't be read: Is a directory", recipe=str(tmp_path / "directory.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    refused(options, "is not TOML", recipe=str(tmp_path / "binary.toml"))


def test_model_with_one_block(tiny_checkpoint: Path, options: Options) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    spec = checkpoint.spec.model_copy(update={"blocks": 1})
    with pytest.raises(UsageError, match="one block has no early exit"):
        decide(options(), spec, checkpoint.family.rotary(checkpoint.config))


def test_tokenizer_of_a_larger_model(
    tiny_checkpoint: Path, options: Options, tmp_path: Path
) -> None:
    import json

    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(CheckpointError, match="but the model has 100 tokens") as caught:
        plan(options(checkpoint=str(checkpoint)))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": "8"}, "rank must be a whole number, not '8'"),
        ({"rank": True}, "rank must be a whole number, not True"),
        ({"max_batch_size": 2.5}, "max-batch-size must be a whole number, not 2.5"),
        ({"precision": 16}, "precision '16' is not known"),
        ({"shortcut": "best"}, "shortcut 'best' can't be built into a bundle"),
        ({"checkpoint": None}, "checkpoint must be a string, not None"),
        ({"output": 5}, "output must be a path, not 5"),
        ({"calibration_data": "code.txt"}, "calibration-data must be a list of paths"),
        ({"calibration_data": [3]}, "a path of calibration-data must be a path, not 3"),
        ({"overwrite": "no"}, "overwrite must be True or False, not 'no'"),
        ({"max_disagreement": "0.1"}, "max-disagreement must be a number, not '0.1'"),
        ({"max_disagreement": 1.5}, "max-disagreement must be between 0 and 1, not 1.5"),
        ({"confidence": 0.9}, "confidence is part of a promise, but none is asked for"),
    ],
)
def test_wrong_values_are_refused_when_they_are_given(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=re.escape(match)):
        BuildOptions(**{"checkpoint": "model", "output": Path("out.ojfa"), **changes})


def test_values_of_the_same_meaning_are_taken() -> None:
    plain = BuildOptions("model", Path("out.ojfa"), calibration_data=(Path("a.txt"),), rank=4)
    others: dict[str, Any] = {"calibration_data": ["a.txt"], "rank": np.int64(4)}
    assert BuildOptions(Path("model"), "out.ojfa", **others) == plain  # type: ignore[arg-type]
