"""What a request asks for: one set of options for `generate`, the engine and the command line."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from ojfa_export.decoding.exits import Exit, resolve_exit
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import UsageError

# A fixed exit, a policy that decides for each token, or "auto", the bundle's own policy.
ExitChoice = Exit | Literal["auto"] | ExitPolicy
MOST_LOGPROBS = 20


class OptionArguments(TypedDict, total=False):
    """The options of `GenerationOptions`, as arguments by name."""

    exit: ExitChoice | None
    speculate: bool | Speculation
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated. Values are checked here, whoever gives them.

    Attributes:
        exit: Blocks to run for each token, or "full"; "auto" decides for each token by the policy
            in the bundle, an `ExitPolicy` by that. None for what the build planned.
        speculate: Whether, or how, to draft at an exit and verify with the other blocks.
        max_new_tokens: Tokens at most.
        temperature: 0 for greedy decoding; else logits are divided by it.
        top_k: Sample among this many most likely tokens; None for all.
        top_p: Sample among the fewest tokens with this much probability.
        min_p: Leave out tokens with less than this share of the likeliest one's probability.
        seed: Of sampling.
        repetition_penalty: Logits of tokens that are there already, in the prompt or after it, are
            divided by it where positive and multiplied where negative; 1 for none.
        presence_penalty: Taken from the logits of tokens that were generated.
        frequency_penalty: The same for each time that they were.
        logit_bias: Added to the logits, by token id.
        stop: Strings that end the text and are no part of it.
        stop_token_ids: Tokens that end the text, beside the model's own.
        ignore_eos: Whether to go on after the model's end-of-text tokens.
        logprobs: How many of the likeliest tokens to give with their log probability, beside the
            chosen one's; None for no log probabilities.

    Raises:
        UsageError: A value of another type, or out of range.
    """

    exit: ExitChoice | None = None
    speculate: bool | Speculation = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            self._set(name, _whole(name, getattr(self, name)))
        for name in _REAL:
            self._set(name, _real(name, getattr(self, name)))
        self._set("stop", _strings("stop", self.stop))
        self._set("stop_token_ids", tuple(_whole("stop_token_ids", i) for i in _many(
            "stop_token_ids", self.stop_token_ids)))  # fmt: skip
        self._set("logit_bias", _biases(self.logit_bias))
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", "True or False", self.ignore_eos)
        if not isinstance(self.speculate, bool | Speculation):
            raise _wrong("speculate", "True, False or a Speculation", self.speculate)
        self._check_ranges()

    @classmethod
    def of(cls, options: GenerationOptions | None, changes: Mapping[str, Any]) -> GenerationOptions:
        """Options with changes.

        Raises:
            UsageError: An option that doesn't exist.
        """
        known = {each.name for each in fields(cls)}
        for name in changes:
            if name not in known:
                raise UsageError(
                    f"there is no option {name!r}", hint=f"known: {', '.join(sorted(known))}"
                )
        if options is not None and not isinstance(options, cls):
            raise UsageError(
                f"options must be GenerationOptions, not {options!r:.60}",
                hint="options by name come after it: max_new_tokens=8",
            )
        base = {} if options is None else {name: getattr(options, name) for name in known}
        return cls(**{**base, **changes})

    @property
    def sampling(self) -> Sampling:
        """Temperature, top-k, top-p and seed."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    @property
    def speculation(self) -> Speculation | None:
        """How to draft, if that is asked for."""
        if isinstance(self.speculate, Speculation):
            return self.speculate
        return Speculation() if self.speculate else None

    @property
    def needs_logits(self) -> bool:
        """Whether tokens can't be chosen without all logits on the host."""
        return self.logprobs is not None or self.adjusts_logits

    @property
    def adjusts_logits(self) -> bool:
        """Whether a penalty, a bias or min-p changes the distribution."""
        return (
            bool(self.logit_bias)
            or self.min_p > 0
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def check_fits(self, blocks: int, vocab_size: int) -> None:
        """Checks what depends on the model.

        Raises:
            UsageError: An exit or a token outside the model, or an exit beside speculation.
        """
        if isinstance(self.exit, ExitPolicy):
            self.exit.check_fits(blocks)
        elif self.exit not in (None, "auto"):
            resolve_exit(self.exit, blocks)  # type: ignore[arg-type]
        if self.speculation is not None:
            self.speculation.resolve_exit(blocks)
            if self.adjusts_logits:
                raise UsageError(
                    "penalties, logit-bias and min-p can't be combined with speculation",
                    hint="leave out speculation: its drafts are checked without them",
                )
            if self.exit not in (None, "full", blocks):
                raise UsageError(
                    "speculation gives the tokens of full depth, and an exit was asked for",
                    hint="leave out one of them; the exit that drafts is a setting of speculation",
                )
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if any(token >= vocab_size for token in ids):
                raise UsageError(
                    f"{name} has token ids outside 0..{vocab_size - 1}",
                    hint="was it written for another model's tokenizer?",
                )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max-new-tokens must be 1 or more, not {self.max_new_tokens}")
        self.sampling  # noqa: B018  checks its own
        for name, low, high in (
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-6, 1e6),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise UsageError(
                    f"{_shown(name)} must be between {low:g} and {high:g}, "
                    f"not {getattr(self, name):g}"
                )
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs must be between 0 and {MOST_LOGPROBS}, not {self.logprobs}")
        if "" in self.stop:
            raise UsageError("a stop string is empty")


_WHOLE = ("max_new_tokens", "top_k", "seed", "logprobs")
_REAL = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_MAY_BE_NONE = ("top_k", "logprobs")


def _shown(name: str) -> str:
    return name.replace("_", "-")


def _wrong(name: str, wanted: str, value: object) -> UsageError:
    return UsageError(f"{_shown(name)} must be {wanted}, not {value!r:.60}")


def _whole(name: str, value: Any) -> int | None:
    """A whole number; NumPy's are taken, True and "5" are not."""
    if value is None and name in _MAY_BE_NONE:
        return None
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or (name == "stop_token_ids" and whole < 0):
        raise _wrong(name, "a whole number", value)
    return whole


def _real(name: str, value: Any) -> float:
    is_number = not isinstance(value, bool | str | bytes) and hasattr(value, "__float__")
    if is_number:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            is_number = False
        else:
            if not math.isnan(number):
                return number
    raise _wrong(name, "a number", value)


def _many(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise _wrong(name, "a list", value)
    return list(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else _many(name, value)
    for each in values:
        if not isinstance(each, str):
            raise _wrong(name, "a string or a list of strings", each)
    return tuple(values)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong("logit_bias", "a mapping of token ids to numbers", value)
    biases = {}
    for token, bias in value.items():
        whole, number = _whole("logit_bias", token), _real("logit_bias", bias)
        if whole is None or whole < 0 or math.isinf(number):
            raise _wrong("logit_bias", "a mapping of token ids to finite numbers", value)
        biases[whole] = number
    return biases
