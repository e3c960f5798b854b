"""What a user asks of a build, joined with a recipe's settings and the defaults."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from ojfa_export.bundle.promise import DEFAULT_CONFIDENCE, Limits, check_limits
from ojfa_export.errors import UsageError
from ojfa_export.models.calibration_text import shipped_text
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.spec import ModelSpec, Precision
from ojfa_export.shortcuts.kinds import SHIPPED, Shipped
from ojfa_export.system.files import read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_CACHE_LENGTH = 4096
DEFAULT_BATCH_SIZE = 16
DEFAULT_WINDOW = 512
# Tokens of calibration text, fitting and held out: enough for small models to be measured well,
# and for large ones several times what fitting needs at least.
DEFAULT_TOKENS = 16_384
TOKENS_PER_FEATURE = 8
# Bytes.
RECIPE_LIMIT = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """What a user asks for; None leaves it to the recipe, then to the default.

    Attributes:
        checkpoint: Directory or hub id.
        output: The bundle to write.
        revision: Of a hub id.
        backend: Engines to build.
        precision: "fp32" or "fp16".
        rank: Of the shortcut; default the paper's, floor(H/100).
        shortcut: "ojfa" or "residual"; default the better one of this rank, as measured.
        max_cache_length: Tokens of a sequence at most.
        max_batch_size: Sequences of a session at most.
        calibration_data: Text or JSONL files, FILE or DOMAIN=FILE; default the text that ships.
        calibration_tokens: Tokens to use of it for the shortcut.
        max_disagreement: To be promised of `--exit auto`: share of tokens that may differ from the
            full model's choice; None promises nothing.
        confidence: Of the promise; default 0.95.
        max_extra_surprisal: To be promised too: nats, on average.
        recipe: Name of one that ships, or a TOML file.
        overwrite: Whether to replace an existing bundle.
        skip_verification: Whether to leave out the comparison with transformers.
        trust_remote_code: Whether transformers may run code in the checkpoint (verification only).
    """

    checkpoint: str
    output: Path
    revision: str | None = None
    backend: str = "onnxruntime"
    precision: str | None = None
    rank: int | None = None
    shortcut: str | None = None
    max_cache_length: int | None = None
    max_batch_size: int | None = None
    calibration_data: tuple[Path, ...] = ()
    calibration_tokens: int | None = None
    max_disagreement: float | None = None
    confidence: float | None = None
    max_extra_surprisal: float | None = None
    recipe: str | None = None
    overwrite: bool = False
    skip_verification: bool = False
    trust_remote_code: bool = False


class RecipeModel(BaseModel):
    """The model that a recipe is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub_id: str
    family: str
    hidden_size: PositiveInt
    blocks: PositiveInt


class Recipe(BaseModel):
    """BuildSettings for one published model, as in the paper where it says them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: RecipeModel
    rank: PositiveInt
    precision: Precision
    calibration_tokens: PositiveInt
    window: PositiveInt
    max_cache_length: PositiveInt
    max_batch_size: PositiveInt


@dataclass(frozen=True)
class BuildSettings:
    """A build's settings, all decided."""

    precision: Precision
    rank: int
    max_cache_length: int
    max_batch_size: int
    calibration_data: tuple[Path, ...]
    calibration_tokens: int
    window: int
    limits: Limits | None = None
    shortcut: Shipped | None = None


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


def settle(options: BuildOptions, spec: ModelSpec, rotary: Rotary | None) -> BuildSettings:
    """Decides every setting: the user's, else the recipe's, else the default.

    Raises:
        UsageError: A setting out of range, or a recipe for another model.
    """
    recipe = read_recipe(options.recipe) if options.recipe else None
    if recipe is not None:
        _check_recipe(recipe, spec, str(options.recipe))
    hidden = spec.hidden_size
    length = _first(
        options.max_cache_length,
        recipe.max_cache_length if recipe else None,
        min(spec.max_positions, DEFAULT_CACHE_LENGTH),
    )
    limits = [length, spec.max_positions, spec.rotary_switch or length]
    settings = BuildSettings(
        precision=_precision(options.precision or (recipe.precision if recipe else "fp32")),
        rank=_first(options.rank, recipe.rank if recipe else None, max(1, hidden // 100)),
        max_cache_length=length,
        max_batch_size=_first(
            options.max_batch_size, recipe.max_batch_size if recipe else None, DEFAULT_BATCH_SIZE
        ),
        calibration_data=options.calibration_data or tuple(shipped_text()),
        calibration_tokens=_first(
            options.calibration_tokens,
            recipe.calibration_tokens if recipe else None,
            max(DEFAULT_TOKENS, TOKENS_PER_FEATURE * hidden),
        ),
        window=min(recipe.window if recipe else DEFAULT_WINDOW, *limits),
        limits=_limits(options),
        shortcut=_shortcut(options.shortcut),
    )
    _check(settings, spec, rotary)
    return settings


def _limits(options: BuildOptions) -> Limits | None:
    """What the user wants promised."""
    if options.max_disagreement is None:
        for name in ("confidence", "max_extra_surprisal"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"{name.replace('_', '-')} is part of a promise, but none is asked for",
                    hint="give --max-disagreement as well, such as 0.05",
                )
        return None
    confidence = DEFAULT_CONFIDENCE if options.confidence is None else options.confidence
    return check_limits(options.max_disagreement, confidence, options.max_extra_surprisal)


def _first(asked: int | None, recipe: int | None, default: int) -> int:
    """The first that is given; 0 is given."""
    return next(value for value in (asked, recipe, default) if value is not None)


def _precision(name: str) -> Precision:
    for precision in get_args(Precision):
        if name == precision:
            return precision  # type: ignore[no-any-return]
    raise UsageError(f"precision '{name}' is not known", hint="known: fp32, fp16")


def _shortcut(name: str | None) -> Shipped | None:
    for kind in SHIPPED:
        if name == kind:
            return kind
    if name is None:
        return None
    raise UsageError(
        f"shortcut '{name}' can't be built into a bundle", hint=f"known: {', '.join(SHIPPED)}"
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


def _check(settings: BuildSettings, spec: ModelSpec, rotary: Rotary | None) -> None:
    if not 1 <= settings.rank <= spec.hidden_size:
        raise UsageError(
            f"rank {settings.rank} is outside 1..{spec.hidden_size}, the model's hidden size",
            hint=f"the paper's rank for this model is {max(1, spec.hidden_size // 100)}",
        )
    for what, value in (
        ("max-cache-length", settings.max_cache_length),
        ("max-batch-size", settings.max_batch_size),
        ("calibration-tokens", settings.calibration_tokens),
    ):
        if value < 1:
            raise UsageError(
                f"{what} must be 1 or more, not {value}",
                hint=f"leave --{what} out for the default",
            )
    grows = rotary is not None and rotary.kind == "dynamic"
    if settings.max_cache_length > spec.max_positions and not grows:
        raise UsageError(
            f"max-cache-length {settings.max_cache_length} is more than the "
            f"{spec.max_positions} positions that the model was made for",
            hint=f"use --max-cache-length {spec.max_positions} or less",
        )
    if spec.blocks < 2:
        raise UsageError("a model with one block has no early exit")
