"""What a user asks of a training."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

from ojfa_export.compiler.options import SHORTCUT_SUFFIX, names
from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import flag, is_whole, listed, text, whole_number, wrong

Device = Literal["cpu", "cuda"]
# Of text, by default. More still helps a wide jump, and takes longer than most want to wait.
DEFAULT_TOKENS = 8_000_000
# Over the text, by default.
DEFAULT_PASSES = 3
# Options that shape a jump: each kind has one of them.
SHAPES = ("width", "rank", "exits", "vocabulary")
_FACTORS = {"": 1, "k": 1000, "m": 1_000_000}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_MOST = 10**12


@dataclass(frozen=True)
class TrainOptions:
    """What a user asks for; values are checked here, whoever gives them.

    Attributes:
        checkpoint: Directory or hub id.
        output: The shortcut file to write.
        jump: Its kind, one of `kinds.KINDS`.
        width: Of an MLP; default the model's own.
        rank: Of a residual jump; default an eighth of the hidden size.
        exits: Of a block jump, each with a block of its own; default one block for all exits.
        vocabulary: Tokens of a draft's own head, the most frequent ones; default the model's head.
        text: Text or JSONL files; default the text that ships.
        self_text: Whether to train on what the model writes, begun by the text's words.
        tokens: How much text to take; "300k" and "8M" are understood too.
        passes: How often the text is read.
        seed: Of all that is random.
        device: "cpu" or "cuda"; default cuda where there is one.
        revision: Of a hub id.
        overwrite: Whether to replace what is at the output.
        ignore_config_fields: Fields of config.json that are not understood and don't matter.

    Raises:
        UsageError: A value of another type, or out of range.
    """

    checkpoint: str
    output: Path
    jump: str = "mlp"
    width: int | None = None
    rank: int | None = None
    exits: tuple[int, ...] | None = None
    vocabulary: int | None = None
    text: tuple[Path, ...] = ()
    self_text: bool = False
    tokens: int = DEFAULT_TOKENS
    passes: int = DEFAULT_PASSES
    seed: int = 0
    device: Device | None = None
    revision: str | None = None
    overwrite: bool = False
    ignore_config_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "checkpoint", text("checkpoint", _plain(self.checkpoint)))
        put(self, "output", _path("output", self.output))
        if self.output.suffix != SHORTCUT_SUFFIX:
            raise UsageError(
                f"output '{self.output}' doesn't end in {SHORTCUT_SUFFIX}",
                hint=f"name it so, as 'build --shortcut' wants it: {self.output}{SHORTCUT_SUFFIX}",
            )
        put(self, "text", tuple(listed("text", self.text, lambda p: _path("a path of text", p))))
        put(self, "tokens", count("tokens", self.tokens))
        put(self, "ignore_config_fields", names("ignore_config_fields", self.ignore_config_fields))
        text("jump", self.jump)
        if self.exits is not None:
            put(self, "exits", tuple(listed("exits", self.exits, _exit)))
        for name in ("width", "rank", "vocabulary"):
            if getattr(self, name) is not None:
                put(self, name, whole_number(name, getattr(self, name), 1))
        put(self, "passes", whole_number("passes", self.passes, 1, 1000))
        put(self, "seed", whole_number("seed", self.seed, 0, 2**32 - 1))
        if self.device is not None and self.device not in get_args(Device):
            raise UsageError(
                f"device '{self.device}' is not known",
                hint=f"known: {', '.join(get_args(Device))}",
            )
        if self.revision is not None:
            text("revision", self.revision)
        for name in ("self_text", "overwrite"):
            flag(name, getattr(self, name))


def count(name: str, value: Any) -> int:
    """A number of things: whole, or with a suffix, "300k" or "1.5M".

    Raises:
        UsageError: Something else, or none.
    """
    hint = "such as 300k or 8M"
    if is_whole(value):
        return whole_number(name, value, 1, _MOST, hint=hint)
    found = _COUNT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise wrong(name, "a number, or one with k or M", value, hint)
    number = Decimal(found[1]) * _FACTORS[found[2].lower()]
    if number != int(number):
        raise wrong(name, "a whole number", value, hint)
    return whole_number(name, int(number), 1, _MOST, hint=hint)


def _exit(value: Any) -> int:
    return whole_number("an exit", value, 1)


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise wrong(name, "a path", value)
    return Path(value)
