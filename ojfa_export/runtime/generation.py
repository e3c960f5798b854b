"""Generating text with a session."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tokenizers import Tokenizer

from ojfa_export.decoding.exits import Exit
from ojfa_export.decoding.logits import TokenLogprobs
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import UsageError
from ojfa_export.runtime.decoding import Decoder, StepByStep, StepWithLogits
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.runtime.session import Session
from ojfa_export.runtime.speculator import Speculator
from ojfa_export.runtime.text import TextStream
from ojfa_export.system.arguments import instance, shown

FinishReason = Literal["end_of_text", "stop_token", "stop_string", "max_new_tokens", "cache_full"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        row: Which prompt of the batch.
        id: Token id.
        text: Text that became certain with it, perhaps none or of several tokens.
        blocks_run: Blocks that computed it.
        finish_reason: Why this is the prompt's last token, or None.
        drafted: Whether speculation proposed it before the full model took it.
        logprobs: If they were asked for.
    """

    row: int
    id: int
    text: str
    blocks_run: int
    finish_reason: FinishReason | None
    drafted: bool = False
    logprobs: TokenLogprobs | None = None


@dataclass
class Completion:
    """What one prompt gave.

    Attributes:
        exit_blocks: Blocks run for each token.
        passes: Passes that gave the tokens: as many as tokens, or fewer where drafts of
            speculation were accepted.
        logprobs: Of each token, if they were asked for.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    exit_blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    passes: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Generation:
    """What a batch of prompts gave.

    Attributes:
        tokens_per_second: Generated tokens of all prompts over the whole time.
        time_to_first_token_ms: Until the first token was known.
    """

    prompts: list[Completion]
    tokens_per_second: float
    time_to_first_token_ms: float


@dataclass(frozen=True)
class Settings:
    """How to generate; see `Model.generate`. Speculation takes the place of the exit.

    Attributes:
        monitor: Takes the session when all prompts have ended.
        domain: Of the prompts, for the monitor.
        options: Where tokens are chosen from logits on the host (`GenerationOptions.needs_logits`),
            how; else None.
        stop_token_ids: Tokens that end a text beside the model's own.
    """

    exit: Exit | ExitPolicy
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    speculation: Speculation | None = None
    monitor: Monitor | None = None
    domain: str | None = None
    options: GenerationOptions | None = None
    stop_token_ids: tuple[int, ...] = ()


def monitored(settings: Settings, monitor: Monitor | None, domain: str | None) -> Settings:
    """The settings with a monitor, if there is one.

    Raises:
        UsageError: Nothing that it could watch.
    """
    if monitor is None:
        if domain is not None:
            raise UsageError(
                f"domain {shown(domain)} was named, and nothing is monitored", hint="give a monitor"
            )
        return settings
    instance("the monitor", monitor, Monitor)
    if settings.speculation is not None:
        raise UsageError(
            "speculation gives the tokens of full depth: there is nothing to monitor",
            hint="leave out one of them",
        )
    monitor.check_domain(domain)
    return replace(settings, monitor=monitor, domain=domain)


def generate_tokens(
    session: Session, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, settings: Settings
) -> Iterator[Token]:
    """Generates for a batch of prompts; each ends by itself.

    Args:
        session: A new session with a sequence for each prompt; with a `shadow` for a monitor.
        prompts: Token ids, at least one each.
        tokenizer: Turns ids into text.
        settings: How.

    Yields:
        Tokens in the order in which they are known, prompt by prompt within a step.
    """
    decoder = _decoder(session, prompts, settings)
    silent = {*settings.eos_token_ids, *settings.stop_token_ids}
    streams = [TextStream(tokenizer, settings.stop, prompt) for prompt in prompts]
    counts = [0] * len(prompts)
    pending: list[list[int]] = [list(prompt) for prompt in prompts]
    while any(pending):
        wanted = [settings.max_new_tokens - count for count in counts]
        chosen, pending = decoder.step(pending, wanted), [[] for _ in prompts]
        for row, tokens in enumerate(chosen):
            for token in tokens:
                counts[row] += 1
                text = "" if token.id in silent else streams[row].push(token.id)
                # The newest token isn't in the cache, and needs a row only if another follows.
                room = session.max_length - (len(prompts[row]) + counts[row] - 1)
                reason = _finish_reason(token.id, streams[row], counts[row], room, settings)
                pending[row] = [token.id] if reason is None else []
                if reason is not None:
                    text += streams[row].finish()
                yield Token(
                    row, token.id, text, token.blocks_run, reason, token.drafted, token.logprobs
                )
                if reason is not None:
                    break
    decoder.end()
    if settings.monitor is not None:
        settings.monitor.finish(session, settings.domain)


def _decoder(session: Session, prompts: Sequence[Sequence[int]], settings: Settings) -> Decoder:
    sampling = settings.sampling
    generators = [sampling.generator(row) for row in range(len(prompts))]
    if settings.options is not None:
        return StepWithLogits(session, settings.exit, settings.options, generators, prompts)
    if settings.speculation is None:
        return StepByStep(session, settings.exit, sampling, generators)
    return Speculator(session, settings.speculation, sampling, generators, settings.eos_token_ids)


def _finish_reason(
    token: int, stream: TextStream, count: int, room: int, settings: Settings
) -> FinishReason | None:
    if token in settings.eos_token_ids:
        return "end_of_text"
    if token in settings.stop_token_ids:
        return "stop_token"
    if stream.stopped:
        return "stop_string"
    if count >= settings.max_new_tokens:
        return "max_new_tokens"
    return "cache_full" if room < 1 else None


def collect(prompts: Sequence[Sequence[int]], tokens: Iterator[Token]) -> Generation:
    """Runs a generation to its end; shadow checks after the last token take none of its time."""
    completions = [Completion(list(prompt)) for prompt in prompts]
    start = time.perf_counter()
    first = seconds = count = 0.0
    for token in tokens:
        seconds = time.perf_counter() - start
        first = first or seconds
        count += 1
        completion = completions[token.row]
        completion.token_ids.append(token.id)
        completion.text += token.text
        completion.exit_blocks.append(token.blocks_run)
        if token.logprobs is not None:
            completion.logprobs.append(token.logprobs)
        # Each pass gives one token that wasn't drafted, unless the text ends before it.
        completion.passes += not token.drafted or token.finish_reason is not None
        completion.finish_reason = token.finish_reason
    return Generation(completions, count / seconds if seconds else 0.0, first * 1000)
