"""Generating text with a session."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tokenizers import Tokenizer

from ojfa_export.runtime.sampling import Sampling
from ojfa_export.runtime.session import Exit, Session, resolve_exit
from ojfa_export.runtime.text import TextStream

FinishReason = Literal["end_of_text", "stop_string", "max_new_tokens", "cache_full"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        row: Which prompt of the batch.
        id: Token id.
        text: Text that became certain with it, perhaps none or of several tokens.
        blocks_run: Blocks that computed it.
        finish_reason: Why this is the prompt's last token, or None.
    """

    row: int
    id: int
    text: str
    blocks_run: int
    finish_reason: FinishReason | None


@dataclass
class Completion:
    """What one prompt gave.

    Attributes:
        exit_blocks: Blocks run for each token.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    exit_blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


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
    """How to generate; see `Model.generate`."""

    exit: Exit
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]


def generate_tokens(
    session: Session, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, settings: Settings
) -> Iterator[Token]:
    """Generates for a batch of prompts; each ends by itself.

    Args:
        session: A new session with a sequence for each prompt.
        prompts: Token ids, at least one each.
        tokenizer: Turns ids into text.
        settings: How.

    Yields:
        Tokens in the order in which they are known, prompt by prompt within a step.
    """
    blocks_run = resolve_exit(settings.exit, session.spec.blocks)
    streams = [TextStream(tokenizer, settings.stop, prompt) for prompt in prompts]
    generators = [settings.sampling.generator(row) for row in range(len(prompts))]
    counts = [0] * len(prompts)
    pending: list[list[int]] = [list(prompt) for prompt in prompts]
    while any(pending):
        logits = session.advance(pending, settings.exit)
        active, pending = [bool(ids) for ids in pending], [[] for _ in prompts]
        for row in (row for row, is_active in enumerate(active) if is_active):
            token = settings.sampling.choose(logits[row], generators[row])
            counts[row] += 1
            text = "" if token in settings.eos_token_ids else streams[row].push(token)
            room = session.max_length - session.lengths[row]
            reason = _finish_reason(token, streams[row], counts[row], room, settings)
            if reason is None:
                pending[row] = [token]
            else:
                text += streams[row].finish()
            yield Token(row, token, text, blocks_run, reason)


def _finish_reason(
    token: int, stream: TextStream, count: int, room: int, settings: Settings
) -> FinishReason | None:
    if token in settings.eos_token_ids:
        return "end_of_text"
    if stream.stopped:
        return "stop_string"
    if count >= settings.max_new_tokens:
        return "max_new_tokens"
    return "cache_full" if room < 1 else None


def collect(prompts: Sequence[Sequence[int]], tokens: Iterator[Token]) -> Generation:
    """Runs a generation to its end."""
    completions = [Completion(list(prompt)) for prompt in prompts]
    start = time.perf_counter()
    first = count = 0.0
    for token in tokens:
        first = first or time.perf_counter() - start
        count += 1
        completion = completions[token.row]
        completion.token_ids.append(token.id)
        completion.text += token.text
        completion.exit_blocks.append(token.blocks_run)
        completion.finish_reason = token.finish_reason
    seconds = time.perf_counter() - start
    return Generation(completions, count / seconds if seconds else 0.0, first * 1000)
