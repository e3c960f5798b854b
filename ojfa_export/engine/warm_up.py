"""Running what an engine will run often, so that no request waits for what is done but once.

On a device passes are recorded: the first of a kind runs piece by piece, and making the recording
takes longer than running it. There is one kind for every number of requests that decode together,
and some for prompts, alone and beside them: `record_kinds` runs each. `WarmUp` then runs requests,
from which the engine learns what passes take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ojfa_export.backends.checks import checking
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.decoding.options import GenerationOptions
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.engine.budget import CacheSize
from ojfa_export.engine.request import Request
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence, expecting

# Steps with each number of requests: one whose tokens are named, and those that follow.
STEPS = 4
# Of a kind: one runs piece by piece, the next is recorded.
ROUNDS = 2
# Prompts that run alone; and requests that decode beside some, and how many of those together.
PROMPTS = (60, 120, 190, 250, 380, 510, 760, 1020, 1530, 2040)
DECODING, BESIDE = (1, 4, 16, 64, 256), (1, 1, 1, 4, 4, 12)


def record_kinds(
    runner: ModelRunner,
    kinds: Iterable[list[int]],
    pages: CacheSize,
    *,
    depth: int,
    sampled: bool = False,
) -> None:
    """Runs a pass to a depth of every kind, and asks the head there about its newest tokens.

    Below full depth the pass goes on from there, as with those that leave at an exit others do.

    Args:
        runner: With nothing in its slots.
        kinds: As of `PagedCache.pass_kinds`.
        pages: Of the cache; a kind that needs more is left out.
        depth: Blocks to run.
        sampled: Whether tokens are drawn, rather than the likeliest.
    """
    most = 0
    if depth < runner.spec.blocks:
        # What waits at an exit gets its room with the first that stops there: another recording.
        _record(runner, [1], depth, _request(1, sampled=sampled))
    for lengths in kinds:
        if pages.needed(lengths) > pages.pages:
            continue
        most = max(most, len(lengths))
        for _ in range(ROUNDS):
            _record(runner, lengths, depth, _request(len(lengths), sampled=sampled))
    for rows in range(1, most + 1):
        hidden = np.zeros((rows, runner.spec.hidden_size), np.float32)
        checks = checking(runner.engines) if depth < runner.spec.blocks else None
        for _ in range(ROUNDS):
            request = _request(rows, sampled=sampled)
            runner.engines.choose(hidden, depth, request).tokens()
            if checks is not None:
                checks.check(hidden, depth).confidence("top")


def _request(rows: int, *, sampled: bool) -> HeadRequest:
    """Whatever the temperatures are: they are no part of what is recorded."""
    return HeadRequest(Sampling(temperature=1.0), [0.5] * rows) if sampled else HeadRequest()


def _record(runner: ModelRunner, lengths: list[int], depth: int, request: HeadRequest) -> None:
    blocks = runner.spec.blocks
    with _in_slots(runner, lengths) as sequences:
        output = runner.choose(sequences, depth, request)
        if max(lengths) == 1:  # and steps whose tokens only the device knows
            with expecting(sequences):
                output = runner.choose(sequences, depth, request, output)
        output.tokens()
        if depth < blocks:
            runner.run_each(sequences, [blocks] * len(lengths), [1] * len(lengths), lengths)
    checks = checking(runner.engines)
    if depth < blocks and checks is not None:  # who leaves is asked before what the token is
        with _in_slots(runner, lengths) as sequences:
            hidden = runner.run(sequences, depth)
            checks.check(hidden, depth).confidence("top")
            runner.engines.choose(hidden, depth, request).tokens()
    if depth < blocks:  # where others go on, heads are asked later
        with _in_slots(runner, lengths) as sequences:
            runner.run_each(sequences, [depth] * len(lengths), [1] * len(lengths), lengths)


@contextmanager
def _in_slots(runner: ModelRunner, lengths: list[int]) -> Iterator[list[Sequence]]:
    """Sequences of these lengths, in the first slots."""
    spec = runner.spec
    sequences = [Sequence(slot, spec.blocks, spec.rotary_switch) for slot in range(len(lengths))]
    try:
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.append([0] * length)
        yield sequences
    finally:
        for slot in range(len(lengths)):
            runner.release(slot)


@dataclass(frozen=True)
class WarmUp:
    """Requests of all numbers, and prompts of all sizes.

    Attributes:
        submit: Of the engine.
        sequences: Requests that run at once.
        max_length: Tokens of one at most.
        vocab_size: Tokens of the model.
    """

    submit: Callable[[list[int], GenerationOptions], Request]
    sequences: int
    max_length: int
    vocab_size: int

    def run(self) -> None:
        """Submits them, and waits for them."""
        lengths = [length for length in PROMPTS if length < self.max_length]
        # As many as run at once, which end one after the other.
        _finish([self._one(1, STEPS * count) for count in range(self.sequences, 0, -1)])
        for length in lengths:
            _finish([self._one(length, 1)])
        # A place is left for a prompt.
        for count in sorted({min(count, self.sequences - 1) for count in DECODING} - {0}):
            if lengths:
                self._beside(count, lengths[-1])

    def _beside(self, count: int, length: int) -> None:
        """Prompts of a length beside requests that decode."""
        decoding = [self._one(1, self.max_length) for _ in range(count)]
        for prompts in BESIDE:
            together = min(prompts, self.sequences - count)
            _finish([self._one(length, 1) for _ in range(together)])
        for each in decoding:
            each.cancel()
        _finish(decoding)

    def _one(self, length: int, tokens: int) -> Request:
        tokens = min(tokens, self.max_length - length)
        options = GenerationOptions(exit="full", max_new_tokens=tokens, ignore_eos=True)
        return self.submit([length % self.vocab_size] * length, options)


def _finish(requests: Iterable[Request]) -> None:
    for each in requests:
        each.result()
