"""Watches a bundle's promise while it serves: some early tokens are compared with the full model.

A comparison is a request of the engine: the text so far, at full depth, for one token. The prefix
cache has most of it. Comparisons run where no client waits, one after the other, so that they take
nothing from anybody but the time of passes that would be smaller without them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import numpy as np

from ojfa_export.bundle.promise import Promise
from ojfa_export.engine.engine import Engine
from ojfa_export.engine.request import Request, RequestResult
from ojfa_export.errors import OjfaError
from ojfa_export.runtime.disagreement import DisagreementMonitor, State
from ojfa_export.system.arguments import real_number

# Requests whose tokens wait to be compared; of more, the newest are left out.
MOST_WAITING = 256
_PAUSE = 0.05


@dataclass(frozen=True)
class _Due:
    """A request with tokens to compare, by their places among the generated ones."""

    prompt: list[int]
    tokens: list[int]
    places: list[int]
    agreeing: int


class PromiseWatch:
    """The watch of one bundle. All of it runs in one event loop.

    Args:
        engine: Runs the comparisons.
        promise: What is watched.
        share: The probability that a token is compared, above 0 and at most 1.
        seed: Of the choice of tokens; None for another one every time.

    Raises:
        UsageError: A share out of range.

    Attributes:
        checks: Early tokens that were compared.
        disagreements: Those of them that differ.
        left_out: Requests that found the queue full; they say nothing.
    """

    def __init__(
        self, engine: Engine, promise: Promise, share: float, seed: int | None = None
    ) -> None:
        self._engine = engine
        self._share = real_number(
            "shadow-share", share, 0.0, 1.0, above_low=True, hint="one token in ten is 0.1"
        )
        self._generator = np.random.default_rng(seed)
        self._monitor = DisagreementMonitor(promise)
        self._waiting: deque[_Due] = deque()
        self._more = asyncio.Event()
        self.limit = promise.limits.max_disagreement
        self.checks = self.disagreements = self.left_out = 0
        self.done = 0

    @property
    def state(self) -> State:
        """Estimate, bounds and alarm."""
        return self._monitor.state(None)

    @property
    def alarm(self) -> bool:
        """Whether the promise was seen to be broken."""
        return bool(self._monitor.alarms)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be compared."""
        return not self._waiting

    def consider(self, request: Request, result: RequestResult) -> None:
        """Chooses tokens of a request that has ended, if the promise is about it.

        That is a greedy request by the bundle's own policy, without changed logits: only there is
        the token that was given the exit's likeliest one.
        """
        options = request.options
        if options.exit != "auto" or options.sampling.temperature or options.adjusts_logits:
            return
        count = len(result.token_ids)
        chosen = np.flatnonzero(self._generator.random(count) < self._share).tolist()
        if not chosen:
            return
        if len(self._waiting) >= MOST_WAITING:
            self.left_out += 1
            return
        blocks = self._engine.model.blocks
        early = [place for place in chosen if result.exit_blocks[place] < blocks]
        agreeing = len(chosen) - len(early)
        self._waiting.append(_Due(request.prompt_token_ids, result.token_ids, early, agreeing))
        self._more.set()

    async def run(self) -> None:
        """Compares what waits, until it is cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._waiting:
                await self._compare(self._waiting[0])
                self._waiting.popleft()

    async def _compare(self, due: _Due) -> None:
        differ = 0
        for place in due.places:
            while self._is_busy():
                await asyncio.sleep(_PAUSE)
            prefix = [*due.prompt, *due.tokens[:place]]
            try:
                result = await self._engine.submit(
                    prefix, exit="full", temperature=0.0, max_new_tokens=1, ignore_eos=True
                )
            except OjfaError:  # the engine ends, or could not run: nothing was learnt
                return
            if not result.token_ids:
                return
            differs = result.token_ids[0] != due.tokens[place]
            differ += differs
            self.checks += 1
            self.disagreements += differs
        self._monitor.update([differ / (len(due.places) + due.agreeing)], None)
        self.done += 1

    def _is_busy(self) -> bool:
        """Whether a client would wait for a comparison."""
        stats = self._engine.stats()
        return stats.waiting > 0 or stats.running >= self._engine.max_sequences
