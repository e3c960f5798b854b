"""A machine that serves requests as the engine does, in a time that passes by a table.

What is the engine's own: `PieceCosts`, which learns from the times of passes how long pieces of
prompts may be. What follows its rules in a few lines, as the originals need a model: admission and
slots (`Engine`, `Slots`), the pieces of a pass (`Scheduler`), and that a pass is chosen when the
one before it begins: a request waits for the rest of one pass and for the whole of the next.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.serving.pass_times import BLOCKS, Load, PassTimes
from ojfa_export.engine.costs import LEAST_PIECE, PieceCosts
from ojfa_export.engine.scheduler import LONGEST_STEP, MOST_SHARE

SLOTS = 64
# How far the times that the engine learns from are spread, as the host sees them: fitted to the
# time to the first token of random arrivals (see `bench.serving.scaling`), not measured.
SPREAD = 0.08
# What pieces might add to a step in the engine that was measured; it has had more since.
MEASURED_SHARE = 0.5
# Tokens of a system prompt; of requests without one.
PREFIX, NO_PREFIX = 512, -1


@dataclass(slots=True, eq=False)
class Asked:
    """A request, and what became of it.

    Attributes:
        at: Seconds when it comes.
        prompt: Tokens.
        tokens: To generate.
        shallow: Whether it leaves at half depth.
        prefix: The system prompt that its first `PREFIX` tokens are, or `NO_PREFIX`.
        left: Tokens of the prompt that have not run.
        cached: That need not run.
        machine: Where it went.
        slot: Its place there.
        first: The pass that gave its first token.
    """

    at: float
    prompt: int
    tokens: int
    shallow: bool = False
    prefix: int = NO_PREFIX
    left: int = 0
    cached: int = 0
    machine: int = -1
    slot: int = -1
    first: int = -1

    def again(self) -> Asked:
        """The same before anything became of it."""
        return Asked(self.at, self.prompt, self.tokens, self.shallow, self.prefix)

    @property
    def last(self) -> int:
        """The pass that gives its last token."""
        return self.first + self.tokens - 1


class Work(NamedTuple):
    """A pass, in which all that decode take part.

    Attributes:
        prompts: Whose prompts run, and how many tokens of each.
        piece: Tokens of them that count as pieces.
        ends_of_prompts: Prompts with so few tokens left that they count as steps.
    """

    prompts: list[tuple[Asked, int]]
    piece: int = 0
    ends_of_prompts: int = 0


class Machine:
    """An engine with its slots.

    Args:
        times: Of passes.
        slots: Requests that run together.
        keeps_prefixes: Whether what requests leave in the cache serves those that begin alike.
        spread: Of the times that it learns from.
        share: What pieces of prompts may add to a step, over its time.
        seed: Of that spread.

    Attributes:
        ends: Seconds when each pass ended.
        load: Tokens that it has been asked for and has not run, of prompts and to generate.
        requests: That it has and that have not ended.
        generated: Tokens.
        pieces: What it learns of pieces.
    """

    def __init__(
        self,
        times: PassTimes,
        slots: int = SLOTS,
        *,
        keeps_prefixes: bool = True,
        spread: float = SPREAD,
        share: float = MEASURED_SHARE,
        seed: int = 0,
    ) -> None:
        self.ends: list[float] = []
        self.load = self.requests = self.generated = 0
        self.pieces = PieceCosts(times.sizes)
        self._times, self._keeps, self._share = times, keeps_prefixes, share
        self._spread, self._rng = spread, np.random.default_rng(seed)
        self._queue: deque[Asked] = deque()
        self._running: dict[int, Asked] = {}  # by slot
        self._prompts: list[Asked] = []  # of those that run, whose prompts have not ended
        self._unused = list(range(slots - 1, -1, -1))
        self._left: OrderedDict[int, int] = OrderedDict()  # prefix by slot, oldest first
        self._full = self._shallow = 0  # that decode
        self._context = 0.0  # tokens before theirs; of those at half depth half as many
        self._last: dict[int, list[Asked]] = {}  # by the pass that gives their last token
        self._seen = 0  # passes whose ends the host has seen
        self._at = self._end = 0.0  # when the next pass is chosen; when the last one ends

    def submit(self, each: Asked) -> None:
        """Takes a request that comes now; the machine must have been advanced until then."""
        each.left = each.prompt
        self._at = max(self._at, each.at)
        self._queue.append(each)
        self.load += each.prompt + each.tokens
        self.requests += 1

    def advance(self, until: float = float("inf")) -> None:
        """Chooses all passes that are chosen before a time."""
        while self._at < until:
            self._give_back_slots()
            self._admit()
            work = self._choose()
            if work is not None:
                self._run(work)
            elif self._at < self._end:
                self._at = self._end  # nothing is certain before
            else:
                return

    def _give_back_slots(self) -> None:
        while self._seen < len(self.ends) and self.ends[self._seen] <= self._at:
            for each in self._last.pop(self._seen, ()):
                del self._running[each.slot]
                self.requests -= 1
                if self._keeps:
                    self._left[each.slot] = each.prefix
                else:
                    self._unused.append(each.slot)
            self._seen += 1

    def _admit(self) -> None:
        while self._queue and (self._unused or self._left):
            each = self._queue.popleft()
            slot = self._find_prefix(each) if each.prefix != NO_PREFIX and self._keeps else None
            if slot is None:
                slot = self._unused.pop() if self._unused else self._left.popitem(last=False)[0]
            each.slot, self._running[slot] = slot, each
            each.left = each.prompt - each.cached
            self.load -= each.cached
            self._prompts.append(each)

    def _find_prefix(self, each: Asked) -> int | None:
        """Takes over what is known of a prompt; the slot, where that is in a free one."""
        for slot, prefix in self._left.items():
            if prefix == each.prefix:
                del self._left[slot]
                each.cached = PREFIX
                return slot
        alike = (other for other in self._running.values() if other.prefix == each.prefix)
        known = max((other.prompt - other.left for other in alike), default=0)
        each.cached = min(known, PREFIX)
        return None

    def _choose(self) -> Work | None:
        """The next pass: all that decode, the ends of prompts, and pieces."""
        others = self._full + self._shallow
        if not self._prompts:
            return Work([]) if others else None
        short = [each for each in self._prompts if each.left <= LONGEST_STEP]
        long = [each for each in self._prompts if each.left > LONGEST_STEP]
        others += len(short)
        prompts, piece = [(each, each.left) for each in short], 0
        left = self._piece(len(long), others) if long else 0
        for each in long:
            if not left or (piece and left < LEAST_PIECE):
                break
            tokens = min(each.left, left)
            prompts.append((each, tokens))
            piece, left = piece + tokens, left - tokens
        return Work(prompts, piece, len(short)) if prompts or others else None

    def _piece(self, prompts: int, others: int) -> int:
        """As `Scheduler` has it."""
        if not others:
            return self.pieces.most
        share = self._share * max(1, prompts // 2, prompts // others)
        is_full = bool(self._queue) and not (self._unused or self._left)
        return self.pieces.choose(others, min(MOST_SHARE, share), MOST_SHARE if is_full else 0.0)

    def _run(self, work: Work) -> None:
        number, start = len(self.ends), max(self._at, self._end)
        decoding = self._full + self._shallow
        self._context += self._full + self._shallow / 2
        full = sum(tokens for each, tokens in work.prompts if not each.shallow)
        shallow = sum(tokens for each, tokens in work.prompts if each.shallow)
        load = Load(self._full, self._shallow, full, shallow, self._context)
        took = self._times.of_pass(load) / 1e3
        self._at, self._end = start, start + took
        self.ends.append(self._end)
        blocks = BLOCKS if self._full or full else BLOCKS // 2
        seen = took * (1 + self._spread * self._rng.standard_normal())
        self.pieces.learn(decoding + work.ends_of_prompts, work.piece, seen / blocks)
        self.generated += decoding
        self.load -= decoding + full + shallow
        for each in self._last.get(number, ()):
            self._count(each, -1, each.prompt + each.tokens - 1)
        for each, tokens in work.prompts:
            each.left -= tokens
            if not each.left:
                self._begin_decoding(each, number)

    def _begin_decoding(self, each: Asked, number: int) -> None:
        self._prompts.remove(each)
        each.first = number
        self.generated += 1
        self.load -= 1
        if each.tokens > 1:
            self._count(each, 1, each.prompt)
        self._last.setdefault(each.last, []).append(each)

    def _count(self, each: Asked, change: int, context: int) -> None:
        """Adds one to those that decode, or takes one away."""
        if each.shallow:
            self._shallow += change
            self._context += change * context / 2
        else:
            self._full += change
            self._context += change * context


class Served(NamedTuple):
    """Times of a request's tokens, in milliseconds: to the first, and between all."""

    first: float
    between: np.ndarray[tuple[int], np.dtype[np.float64]]


def served(each: Asked, ends: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Served:
    """When a request got its tokens, by the ends of its machine's passes."""
    times = ends[each.first : each.last + 1]
    return Served(1e3 * float(times[0] - each.at), 1e3 * np.diff(times))
