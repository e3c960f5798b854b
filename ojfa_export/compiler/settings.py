"""The settings of a build, decided: the user's, else the recipe's, else the default."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from ojfa_export.bundle.weight_format import (
    GROUP_SIZES,
    Quantised,
    WeightFormat,
    quantised_features,
)
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.errors import UsageError
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.files import read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_CACHE_LENGTH = 4096
DEFAULT_BATCH_SIZE = 16
DEFAULT_WINDOW = 512
# Where no backend says what it would rather have.
DEFAULT_GROUP_SIZE = 32
# Tokens of calibration text, fitting and held out: enough for small models to be measured well,
# and for large ones several times what fitting needs at least.
DEFAULT_TOKENS = 16_384
TOKENS_PER_FEATURE = 8
# Bytes.
RECIPE_LIMIT = 1 << 20


class BuildSettings(BaseModel):
    """What is decided for a model: the names are those of `BuildOptions`.

    Attributes:
        weights: None where matrices are stored as `precision` says. What a checkpoint has quantised
            already counts as asked for.
        group_size: None without quantised weights.
        check_vocabulary: Tokens of a check head, 0 for none; None where it is decided by what a
            check of the exit head costs (`check_stage`).
        draft_vocabulary: Tokens of the head that a draft layer gets, 0 for the model's own; None
            where it is decided by how large that is (`draft_head`).
        window: Tokens of a window of calibration text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision
    weights: Quantised | None = None
    group_size: PositiveInt | None = None
    rank: PositiveInt
    check_vocabulary: NonNegativeInt | None = None
    draft_vocabulary: NonNegativeInt | None = None
    max_cache_length: PositiveInt
    max_batch_size: PositiveInt
    calibration_tokens: PositiveInt
    window: PositiveInt

    @property
    def weight_format(self) -> WeightFormat | None:
        """What quantised matrices are stored as; None where none is."""
        if self.weights is None or self.group_size is None:
            return None
        return WeightFormat(
            storage=self.weights,
            group_size=self.group_size,
            zero_points=self.weights != "fp8",
        )


@dataclass(frozen=True)
class Stored:
    """What a checkpoint has quantised already.

    Attributes:
        layout: What people call it.
        form: What a bundle stores its whole numbers as; None where it has none.
    """

    layout: str
    form: WeightFormat | None


class RecipeModel(BaseModel):
    """The model that a recipe is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub_id: str
    family: str
    hidden_size: PositiveInt
    blocks: PositiveInt


class Recipe(BuildSettings):
    """Settings for one published model, as in the paper where it says them."""

    model: RecipeModel


def recipes_directory() -> Path:
    """Where the recipes that ship are."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_calibration" / "recipes"
    return installed if installed.is_dir() else package.parent / "calibration" / "recipes"


def read_recipe(name: str) -> Recipe:
    """Reads a recipe that ships, by name, or a TOML file.

    Raises:
        UsageError: No such recipe, or one with unknown or missing settings.
    """
    path = Path(name) if name.endswith(".toml") else recipes_directory() / f"{name}.toml"
    try:
        return Recipe.model_validate(tomllib.loads(read_regular(path, RECIPE_LIMIT).decode()))
    except FileNotFoundError:
        known = ", ".join(sorted(each.stem for each in recipes_directory().glob("*.toml")))
        raise UsageError(
            f"recipe '{name}' is not known", hint=f"known: {known}; or name a .toml file"
        ) from None
    except OSError as error:
        raise UsageError(
            f"recipe {path} can't be read: {error.strerror or error}", hint="name a .toml file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"recipe {path} is not TOML: {error}", hint="see the recipes that ship"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"recipe {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            hint="see the recipes that ship for the settings",
        ) from error


def decide(
    options: BuildOptions,
    spec: ModelSpec,
    rotary: Rotary | None,
    stored: Stored | None = None,
    group_sizes: Sequence[int] = (DEFAULT_GROUP_SIZE,),
) -> BuildSettings:
    """Decides every setting: the user's, else the recipe's, else the default.

    Args:
        options: The user's.
        spec: The model.
        rotary: Its rotary embedding.
        stored: What the checkpoint has quantised already, if anything.
        group_sizes: Of quantised weights; the first that divides the model's features is the
            default.

    Raises:
        UsageError: A setting that doesn't suit the model, or a recipe for another model.
    """
    settings = _not_given(options, spec)
    given = {name: getattr(options, name, None) for name in BuildSettings.model_fields}
    decided = {
        name: getattr(settings, name) if value is None else value for name, value in given.items()
    }
    if stored is not None:
        _keep(decided, stored)
    else:
        if decided["weights"] is not None and decided["group_size"] is None:
            decided["group_size"] = _default_group_size(spec, group_sizes)
        _check_weights(decided["weights"], decided["group_size"], spec)
    _check(decided["rank"], decided["max_cache_length"], spec, rotary)
    for name in ("check_vocabulary", "draft_vocabulary"):
        _check_size(name.replace("_", "-"), decided[name], spec)
    length = decided["max_cache_length"]
    # A window of text is one forward pass of the reference, and must be read by one set of factors.
    decided["window"] = min(
        decided["window"], length, spec.max_positions, spec.rotary_switch or length
    )
    return BuildSettings(**decided)


def decide_precision(options: BuildOptions, spec: ModelSpec) -> Precision:
    """The precision that `decide` decides; raises as it does."""
    return options.precision or _not_given(options, spec).precision


def _not_given(options: BuildOptions, spec: ModelSpec) -> BuildSettings:
    """What holds where a user says nothing: the recipe's settings, or the default."""
    if options.recipe is None:
        return default_settings(spec)
    recipe = read_recipe(options.recipe)
    _check_recipe(recipe, spec, options.recipe)
    return recipe


def default_settings(spec: ModelSpec) -> BuildSettings:
    """The settings of a model that has no recipe."""
    return BuildSettings(
        precision="fp32",
        rank=max(1, spec.hidden_size // 100),
        max_cache_length=min(spec.max_positions, DEFAULT_CACHE_LENGTH),
        max_batch_size=DEFAULT_BATCH_SIZE,
        calibration_tokens=max(DEFAULT_TOKENS, TOKENS_PER_FEATURE * spec.hidden_size),
        window=DEFAULT_WINDOW,
    )


def _check_recipe(recipe: Recipe, spec: ModelSpec, name: str) -> None:
    for what, wanted, found in (
        ("family", recipe.model.family, spec.family),
        ("hidden size", recipe.model.hidden_size, spec.hidden_size),
    ):
        if wanted != found:
            raise UsageError(
                f"recipe '{name}' is for {recipe.model.hub_id} with {what} {wanted}; "
                f"this checkpoint has {found}",
                hint="leave --recipe out, or name the recipe of this model",
            )


def _default_group_size(spec: ModelSpec, group_sizes: Sequence[int]) -> int:
    """The first that divides all features; where none does, the first, which is refused."""
    features = quantised_features(spec)
    fitting = (size for size in group_sizes if not any(each % size for each in features))
    return next(fitting, group_sizes[0])


def _check_weights(weights: Quantised | None, group_size: int | None, spec: ModelSpec) -> None:
    if weights is None:
        if group_size is not None:
            raise UsageError(
                f"group-size {group_size} is of quantised weights, but none are asked for",
                hint="give --weights int4, int8 or fp8 as well",
            )
        return
    assert group_size is not None
    for features in quantised_features(spec):
        if features % group_size:
            fitting = [str(size) for size in GROUP_SIZES if not features % size]
            raise UsageError(
                f"group-size {group_size} doesn't divide the model's {features} features",
                hint=f"sizes that do: {', '.join(fitting)}"
                if fitting
                else "this model's weights can't be quantised",
            )


def _check_size(name: str, size: int | None, spec: ModelSpec) -> None:
    if size is not None and size > spec.vocab_size:
        raise UsageError(
            f"{name} {size} is more than the model's {spec.vocab_size} tokens",
            hint="give fewer, or 0 for no head of its own",
        )


def _keep(decided: dict[str, Any], stored: Stored) -> None:
    """Takes over what a checkpoint has quantised; another format that is asked for is refused."""
    form = stored.form
    own = {
        "weights": None if form is None else form.storage,
        "group_size": None if form is None else form.group_size,
    }
    for name, value in own.items():
        if decided[name] not in (None, value):
            what = f"are {form}" if form is not None else "are 8-bit floats"
            raise UsageError(
                f"{name.replace('_', '-')} {decided[name]} is asked for, but this checkpoint's "
                f"weights {what} already ({stored.layout})",
                hint="leave --weights and --group-size out, or build from the checkpoint that it "
                "was made from",
            )
        decided[name] = value


def _check(rank: int, length: int, spec: ModelSpec, rotary: Rotary | None) -> None:
    if not 1 <= rank <= spec.hidden_size:
        raise UsageError(
            f"rank {rank} is outside 1..{spec.hidden_size}, the model's hidden size",
            hint=f"the paper's rank for this model is {max(1, spec.hidden_size // 100)}",
        )
    if length > spec.max_positions:
        if rotary is not None and rotary.kind == "dynamic":
            raise UsageError(
                f"max-cache-length {length} is more than the {spec.max_positions} positions up to "
                "which dynamic rotary scaling rotates a token by its position alone",
                hint=f"use --max-cache-length {spec.max_positions} or less",
            )
        raise UsageError(
            f"max-cache-length {length} is more than the {spec.max_positions} positions that the "
            "model was made for",
            hint=f"use --max-cache-length {spec.max_positions} or less",
        )
    if spec.blocks < 2:
        raise UsageError("a model with one block has no early exit")
