"""Asking heads about the tokens of many requests at once, each of which wants something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ojfa_export.backends.draft import Drafts
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest, HostHeadOutput
from ojfa_export.decoding.sampling import GREEDY, Sampling
from ojfa_export.engine.next_step import NextStep


class Heads:
    """What a head said about the tokens of several requests; waits where that is on its way.

    Args:
        output: Of all of them.
        logits: By first row, of requests that asked for them, where the output has none.
    """

    def __init__(self, output: HeadOutput, logits: dict[int, Float32] | None = None) -> None:
        self.output, self._logits = output, logits or {}
        self._on_host = output.logits if isinstance(output, HostHeadOutput) else None
        self._tokens: list[int] | None = None
        self._likeliest: list[int] | None = None
        self._confidence: dict[Measure, list[float]] = {}

    def wait(self) -> None:
        """Waits until all has been said."""
        if self._on_host is None:
            self.likeliest()

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits."""
        if self._likeliest is None:
            self._likeliest = self.output.likeliest()
        return self._likeliest

    def confidence(self, measure: Measure) -> list[float]:
        """How confident the head is of each."""
        if measure not in self._confidence:
            self._confidence[measure] = self.output.confidence(measure)
        return self._confidence[measure]

    def token(self, row: int, sampling: Sampling, draw: float) -> int:
        """The token that a request chooses."""
        if sampling is GREEDY:
            return self.likeliest()[row]
        if self._on_host is not None:
            return sampling.pick(self._on_host[row], draw)
        if self._tokens is None:
            self._tokens = self.output.tokens()
        return self._tokens[row]

    def drafts(self, row: int) -> list[int]:
        """The one token that a draft layer's head drafts."""
        return self.likeliest()[row : row + 1]

    def logits(self, row: int, rows: int) -> Float32:
        """Logits [rows, V] of a request that asked for them, from its first row on."""
        if self._on_host is None:
            return self._logits[row]
        logits: Float32 = self._on_host[row : row + rows]
        return logits


class ChainHeads(Heads):
    """What a draft layer said of several requests, draft after draft.

    Args:
        chain: Its drafts.
    """

    def __init__(self, chain: Drafts) -> None:
        self._chain = chain

    def wait(self) -> None:
        """Waits until all are there."""
        self._chain.drafts()

    def drafts(self, row: int) -> list[int]:
        """All drafts of a request."""
        return self._chain.drafts()[row]


class Asked(Protocol):
    """The part of `Engines`, and of `DraftEngines`, that is asked about hidden states."""

    def logits(self, hidden: Hidden, blocks_run: int) -> Float32:
        """See `Engines.logits`."""
        ...

    def choose(self, hidden: Hidden, blocks_run: int, request: HeadRequest) -> HeadOutput:
        """See `Engines.choose`."""
        ...


def run_heads(engines: Asked, hidden: Hidden, depth: int, steps: Sequence[NextStep]) -> Heads:
    """Asks the head after so many blocks what all requests want to know.

    Args:
        engines: The opened engines; after 0 blocks a draft layer's.
        hidden: [sum of rows, H], step by step.
        depth: Blocks run.
        steps: Of each request.
    """
    if all(step.logits for step in steps):
        return Heads(HostHeadOutput(engines.logits(hidden, depth), HeadRequest()))
    output = engines.choose(hidden, depth, head_request(steps))
    if isinstance(output, HostHeadOutput):
        return Heads(output)
    return Heads(output, _logits(engines, hidden, depth, steps))


def _logits(
    engines: Asked, hidden: Hidden, depth: int, steps: Sequence[NextStep]
) -> dict[int, Float32]:
    """Logits of those that need them on the host, by first row."""
    wanted: list[int] = []
    parts: dict[int, slice] = {}
    row = 0
    for step in steps:
        if step.logits:
            parts[row] = slice(len(wanted), len(wanted) + step.rows)
            wanted.extend(range(row, row + step.rows))
        row += step.rows
    if not wanted:
        return {}
    logits = engines.logits(hidden[wanted], depth)
    return {row: logits[part] for row, part in parts.items()}


def head_request(steps: Sequence[NextStep]) -> HeadRequest:
    """What a head is asked, with each request's random number where any samples."""
    samplings = [step.sampling for step in steps for _ in range(step.rows)]
    if all(each is GREEDY for each in samplings):
        return HeadRequest()
    draws = [step.draw for step in steps for _ in range(step.rows)]
    if all(each is samplings[0] for each in samplings):
        return HeadRequest(samplings[0], draws)
    return HeadRequest(draws=draws, samplings=samplings)


def ask_for_one_token(steps: Sequence[NextStep]) -> bool:
    """Whether each wants one next token, and no more than that."""
    return all(step.rows == 1 and not step.logits for step in steps)
