"""What a request asks for: one set of options for `generate`, the engine and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

from ojfa_export.decoding.exits import Exit, resolve_exit
from ojfa_export.decoding.generation_defaults import NO_DEFAULTS, GenerationDefaults
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import UsageError
from ojfa_export.system.arguments import flag, listed, real_number, shown, text, whole_number, wrong

# A fixed exit, a policy that decides for each token, or "auto", the bundle's own policy.
ExitChoice = Exit | Literal["auto"] | ExitPolicy
MOST_LOGPROBS = 20
# Far above any logit; float32 still tells differences of a thousandth beside it.
MOST_BIAS = 1e4


class OptionArguments(TypedDict, total=False):
    """The options of `GenerationOptions`, as arguments by name."""

    exit: ExitChoice | None
    speculate: bool | Speculation
    max_new_tokens: int
    sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    repetition_penalty: float | None
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

    What is None is as the bundle has it from the checkpoint's generation_config.json, else off:
    `completed` fills it in.

    Attributes:
        exit: Blocks to run for each token, or "full"; "auto" decides for each token by the policy
            in the bundle, an `ExitPolicy` by that. None for what the build planned.
        speculate: Whether, or how, to draft at an exit and verify with the other blocks.
        max_new_tokens: Tokens at most.
        sample: Whether to sample where no temperature is named: at the bundle's, else at 1.
        temperature: 0 for greedy decoding; else logits are divided by it. None is greedy without
            `sample`.
        top_k: Sample among this many most likely tokens; as many as the vocabulary has for all.
        top_p: Sample among the fewest tokens with this much probability.
        min_p: Leave out tokens with less than this share of the likeliest one's probability.
        seed: Of sampling.
        repetition_penalty: Logits of tokens that are there already, in the prompt or after it, are
            divided by it where positive and multiplied where negative; 1 for none.
        presence_penalty: Taken from the logits of tokens that were generated.
        frequency_penalty: The same for each time that they were.
        logit_bias: Added to the logits, by token id, from -10,000 to 10,000. Tokens that the bundle
            suppresses have -10,000 unless they are named.
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
    sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        read = {
            name: reader(_shown(name), getattr(self, name)) for name, reader in _READERS.items()
        }
        for name in ("temperature", "top_k", "top_p", "seed"):
            if getattr(self, name) is not None:
                read[name] = getattr(self.sampling, name)
        for name, value in read.items():
            object.__setattr__(self, name, value)
        if self.sample and self.temperature == 0:
            raise UsageError(
                "sample was asked for, and temperature 0 is greedy decoding",
                hint="leave out one of them",
            )

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
                f"options must be GenerationOptions, not {shown(options)}",
                hint="options by name come after it: max_new_tokens=8",
            )
        base = {} if options is None else {name: getattr(options, name) for name in known}
        return cls(**{**base, **changes})

    def completed(self, defaults: GenerationDefaults) -> GenerationOptions:
        """The options with a bundle's defaults where they name no value.

        Raises:
            UsageError: Speculation is asked for, which the defaults can't be combined with.
        """
        sampled = self.sample if self.temperature is None else self.temperature > 0
        given = defaults if sampled else NO_DEFAULTS
        values: dict[str, Any] = {
            "temperature": (given.temperature or 1.0) if sampled else 0.0,
            "top_k": given.top_k,
            "top_p": given.top_p or 1.0,
            "min_p": given.min_p or 0.0,
            "repetition_penalty": defaults.repetition_penalty or 1.0,
        }
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        suppressed = dict.fromkeys(defaults.suppress_tokens, -MOST_BIAS)
        completed = replace(self, **missing, logit_bias=suppressed | dict(self.logit_bias))
        if completed.adjusts_logits and self.speculation is not None and not self.adjusts_logits:
            raise UsageError(
                "the bundle's own defaults can't be combined with speculation: "
                + ", ".join(filter(None, (defaults.always, defaults.sampling))),
                hint="leave out speculation, or name other values: --repetition-penalty 1, "
                "--min-p 0, --logit-bias TOKEN=0",
            )
        return completed

    @property
    def sampling(self) -> Sampling:
        """Temperature, top-k, top-p and seed; off where they are None."""
        temperature = 0.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(temperature, self.top_k, top_p, self.seed)

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
            any(self.logit_bias.values())
            or bool(self.min_p and self.temperature)
            or self.repetition_penalty not in (None, 1)
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def check_fits(
        self,
        blocks: int,
        vocab_size: int,
        *,
        has_layer: bool = False,
        served: Sequence[int] | None = None,
    ) -> None:
        """Checks what depends on the model.

        Args:
            blocks: Of the model.
            vocab_size: Of the model.
            has_layer: Whether it has a draft layer.
            served: The exits that there are before the last block; None for all.

        Raises:
            UsageError: An exit or a token outside the model, or an exit beside speculation.
        """
        if isinstance(self.exit, ExitPolicy):
            self.exit.check_fits(blocks, served)
        elif self.exit not in (None, "auto"):
            resolve_exit(self.exit, blocks, served)  # type: ignore[arg-type]
        if self.speculation is not None:
            self.speculation.resolve_exit(blocks, has_layer=has_layer, served=served)
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


def _shown(name: str) -> str:
    return name.replace("_", "-")


def _exit(name: str, value: Any) -> ExitChoice | None:
    """Whether the model has it is seen later: `GenerationOptions.check_fits`."""
    if value is None or isinstance(value, ExitPolicy):
        return value
    if isinstance(value, str) and value in ("full", "auto"):
        return value  # type: ignore[return-value]
    hint = "a number of blocks to run, 'full', 'auto' or an ExitPolicy"
    return whole_number(name, value, hint=hint)


def _speculate(name: str, value: Any) -> bool | Speculation:
    if not isinstance(value, bool | Speculation):
        raise wrong(name, "True, False or a Speculation", value)
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    wanted = "a string or a list of strings"
    if isinstance(value, str):
        value = [value]
    strings = tuple(listed(name, value, lambda each: text(f"a {name} string", each), wanted))
    if "" in strings:
        raise UsageError("a stop string is empty", hint="leave it out to end nowhere")
    return strings


def _token_id(name: str, value: Any) -> int:
    return whole_number(f"a token id of {name}", value, 0)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    return tuple(listed(name, value, lambda each: _token_id(name, each), "a list of token ids"))


def _biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping of token ids to numbers", value)
    return {
        _token_id(name, token): real_number(f"a value of {name}", bias, -MOST_BIAS, MOST_BIAS)
        for token, bias in value.items()
    }


def _logprobs(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(name, value, 0, MOST_LOGPROBS)


def _between(low: float, high: float) -> Callable[[str, Any], float]:
    return lambda name, value: real_number(name, value, low, high)


def _optional(low: float, high: float) -> Callable[[str, Any], float | None]:
    return lambda name, value: None if value is None else real_number(name, value, low, high)


# How each option is read; those of sampling are read by `Sampling`.
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "exit": _exit,
    "speculate": _speculate,
    "max_new_tokens": lambda name, value: whole_number(name, value, 1),
    "sample": flag,
    "min_p": _optional(0.0, 1.0),
    "repetition_penalty": _optional(1e-6, 1e6),
    "presence_penalty": _between(-100.0, 100.0),
    "frequency_penalty": _between(-100.0, 100.0),
    "logit_bias": _biases,
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": flag,
    "logprobs": _logprobs,
}
