"""What a user asks of a build: one set of options for every command that reads a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ojfa_export.backends.narrow_cache import CacheStorage
from ojfa_export.bundle.promise import DEFAULT_CONFIDENCE, Limits, check_limits
from ojfa_export.bundle.weight_format import GROUP_SIZES, Quantised
from ojfa_export.errors import UsageError
from ojfa_export.models.precision import Precision
from ojfa_export.shortcuts.kinds import SHIPPED, Shipped
from ojfa_export.system.arguments import flag, listed, real_number, text, whole_number, wrong

SHORTCUT_SUFFIX = ".safetensors"
# A promise on what the model writes, instead of one on files, or together with it.
SelfTextUse = Literal["alone", "beside"]


@dataclass(frozen=True)
class BuildOptions:
    """What a user asks for; None leaves it to the recipe, then to the default.

    Values are checked here, whoever gives them; what depends on the model is checked once its
    config has been read (`settings.decide`).

    Attributes:
        checkpoint: Directory or hub id.
        output: The bundle to write.
        revision: Of a hub id.
        backend: Engines to build.
        precision: "fp32", "fp16" or "bf16".
        weights: "int4", "int8" or "fp8", to quantise blocks' matrices and heads; default as
            precision says, and those of a checkpoint that is quantised as they are.
        group_size: Quantised weights that share a scale; default what the backend says, 32 on the
            CPU and 128 on a GPU, or the largest that divides the model's features.
        cache: "fp8", to keep keys and values in that; default in what products are computed in.
        rank: Of the shortcut; default the paper's, floor(H/100).
        shortcut: "ojfa", "residual", or the file of a shortcut that exists; default the better one
            of this rank, as measured. Also, or beside it in a list, the file of a draft layer or
            the directory of an EAGLE-3 drafter.
        check_vocabulary: Most frequent tokens of a head that exit policies ask in place of the
            exit head, 2 or more; 0 for none. By default where a promise is asked for and the head
            is a large part of a token (`check_stage`).
        draft_vocabulary: Most frequent tokens, 2 or more, of the head that a draft layer without
            one gets; 0 for the model's. By default where that is large (`draft_head`).
        max_cache_length: Tokens of a sequence at most.
        max_batch_size: Sequences of a session at most.
        calibration_data: Text or JSONL files, FILE or DOMAIN=FILE; default the text that ships.
        calibration_tokens: Tokens to use of it for the shortcut.
        max_disagreement: To be promised of `--exit auto`: share of tokens that may differ from the
            full model's choice; None promises nothing.
        confidence: Of the promise; default 0.95.
        max_extra_surprisal: To be promised too: nats, on average.
        self_text: "alone" makes the promise on what the model writes itself, "beside" on that and
            on the files; None on the files.
        self_text_windows: So many windows of 256 tokens, or of as many as the cache holds; default
            four times what the promise needs at the least, and 64 or more.
        recipe: Name of one that ships, or a TOML file.
        overwrite: Whether to replace an existing bundle.
        skip_verification: Whether to leave out the comparison with transformers.
        trust_remote_code: Whether transformers may run code in the checkpoint (verification only).
        ignore_config_fields: Fields of config.json that are not understood and don't matter.

    Raises:
        UsageError: A value of another type, or out of range.
    """

    checkpoint: str
    output: Path
    revision: str | None = None
    backend: str = "onnxruntime"
    precision: Precision | None = None
    weights: Quantised | None = None
    group_size: int | None = None
    cache: CacheStorage | None = None
    rank: int | None = None
    shortcut: Shipped | Path | Sequence[Shipped | Path] | None = None
    check_vocabulary: int | None = None
    draft_vocabulary: int | None = None
    max_cache_length: int | None = None
    max_batch_size: int | None = None
    calibration_data: tuple[Path, ...] = ()
    calibration_tokens: int | None = None
    max_disagreement: float | None = None
    confidence: float | None = None
    max_extra_surprisal: float | None = None
    self_text: SelfTextUse | None = None
    self_text_windows: int | None = None
    recipe: str | None = None
    overwrite: bool = False
    skip_verification: bool = False
    trust_remote_code: bool = False
    ignore_config_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, reader in _READERS.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                object.__setattr__(self, name, reader(name.replace("_", "-"), value))
        _ = self.limits  # what can never be promised is refused here
        if self.self_text_windows is not None and self.self_text is None:
            raise UsageError(
                "self-text-windows is given, but nothing is promised on self-text",
                hint="add --self-text alone or --self-text beside",
            )

    @property
    def shortcuts(self) -> tuple[Shipped | Path, ...]:
        """What is given as a shortcut, one each."""
        assert self.shortcut is None or isinstance(self.shortcut, tuple)
        return self.shortcut or ()

    @property
    def limits(self) -> Limits | None:
        """What is to be promised, if anything."""
        if self.max_disagreement is None:
            for name in ("confidence", "max_extra_surprisal", "self_text"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{name.replace('_', '-')} is part of a promise, but none is asked for",
                        hint="give --max-disagreement as well, such as 0.05",
                    )
            return None
        confidence = DEFAULT_CONFIDENCE if self.confidence is None else self.confidence
        return check_limits(self.max_disagreement, confidence, self.max_extra_surprisal)


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise wrong(name, "a path", value)
    return Path(value)


def _paths(name: str, value: Any) -> tuple[Path, ...]:
    wanted = "a list of paths"
    return tuple(listed(name, value, lambda each: _path(f"a path of {name}", each), wanted))


def names(name: str, value: Any) -> tuple[str, ...]:
    """A list of names, sorted, each once.

    Raises:
        UsageError: Something else.
    """
    found = listed(name, value, lambda each: text(f"a name of {name}", each), "a list of names")
    return tuple(sorted(set(found)))


def _name_or_path(name: str, value: Any) -> str:
    return text(name, os.fspath(value) if isinstance(value, os.PathLike) else value)


def _precision(name: str, value: Any) -> Precision:
    for precision in get_args(Precision):
        if value == precision:
            return precision  # type: ignore[no-any-return]
    raise UsageError(
        f"{name} '{value}' is not known", hint=f"known: {', '.join(get_args(Precision))}"
    )


def _weights(name: str, value: Any) -> Quantised:
    for storage in get_args(Quantised):
        if value == storage:
            return storage  # type: ignore[no-any-return]
    raise UsageError(
        f"{name} '{value}' is not known", hint=f"known: {', '.join(get_args(Quantised))}"
    )


def cache_storage(name: str, value: Any) -> CacheStorage:
    """What keys and values are kept in.

    Raises:
        UsageError: It isn't known.
    """
    for storage in get_args(CacheStorage):
        if value == storage:
            return storage  # type: ignore[no-any-return]
    raise UsageError(
        f"{name} '{value}' is not known", hint=f"known: {', '.join(get_args(CacheStorage))}"
    )


def _group_size(name: str, value: Any) -> int:
    size = whole_number(name, value)
    if size not in GROUP_SIZES:
        raise UsageError(
            f"{name} {size} can't be: groups are powers of two from {GROUP_SIZES[0]} to "
            f"{GROUP_SIZES[-1]}",
            hint=f"leave --{name} out for groups of 32",
        )
    return size


def _self_text(name: str, value: Any) -> SelfTextUse:
    for use in get_args(SelfTextUse):
        if value == use:
            return use  # type: ignore[no-any-return]
    raise UsageError(f"{name} '{value}' is not known", hint="known: alone, beside")


def _shortcuts(name: str, value: Any) -> tuple[Shipped | Path, ...]:
    if isinstance(value, str | os.PathLike):
        value = [value]
    wanted = "a kind, a path, or a list of these"
    return tuple(listed(name, value, lambda each: _shortcut(name, each), wanted))


def _shortcut(name: str, value: Any) -> Shipped | Path:
    for kind in SHIPPED:
        if value == kind:
            return kind
    is_path = isinstance(value, os.PathLike) or str(value).endswith(SHORTCUT_SUFFIX)
    if is_path or (isinstance(value, str) and Path(value).is_dir()):
        return _path(name, value)
    raise UsageError(
        f"{name} '{value}' can't be built into a bundle",
        hint=f"known: {', '.join(SHIPPED)}, a file whose name ends in {SHORTCUT_SUFFIX}, or the "
        "directory of an EAGLE-3 drafter",
    )


def _positive(name: str, value: Any) -> int:
    return whole_number(name, value, 1, hint=f"leave --{name} out for the default")


def _vocabulary(name: str, value: Any) -> int:
    hint = f"give 0 for no head of its own, or leave --{name} out for the default"
    size = whole_number(name, value, 0, hint=hint)
    if size == 1:  # which is always the likeliest
        raise UsageError(f"{name} 1 can't be: one token says nothing", hint=hint)
    return size


_REQUIRED = (
    "checkpoint",
    "output",
    "backend",
    "calibration_data",
    "overwrite",
    "skip_verification",
    "trust_remote_code",
    "ignore_config_fields",
)
# How each option is read where it is given.
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "checkpoint": _name_or_path,
    "output": _path,
    "revision": text,
    "backend": text,
    "precision": _precision,
    "weights": _weights,
    "group_size": _group_size,
    "cache": cache_storage,
    "rank": whole_number,
    "shortcut": _shortcuts,
    "check_vocabulary": _vocabulary,
    "draft_vocabulary": _vocabulary,
    "max_cache_length": _positive,
    "max_batch_size": _positive,
    "calibration_data": _paths,
    "calibration_tokens": _positive,
    "max_disagreement": real_number,
    "confidence": real_number,
    "max_extra_surprisal": real_number,
    "self_text": _self_text,
    "self_text_windows": _positive,
    "recipe": _name_or_path,
    "overwrite": flag,
    "skip_verification": flag,
    "trust_remote_code": flag,
    "ignore_config_fields": names,
}
