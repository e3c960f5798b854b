"""Steps of one sequence on made-up tokens, timed kind by kind in turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.draft import DraftEngines
from ojfa_export.decoding.exits import Exit
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import Progress

# Tokens in the cache before the first step.
PAST = 128
# Steps at the beginning of a turn that aren't counted: they find another kind's caches.
SETTLING = 4
FEWEST_ROUNDS = 3
# Tokens of steps that are timed as one where each begins before the token before it is known.
FOLLOWING = 8
# Tokens of steps that follow each other before the cache is taken back to its past.
_GROWTH = 128

Clock = Callable[[], float]
Step = Callable[[], object]
Kind = TypeVar("Kind", bound=Hashable)


class Turns:
    """One sequence on which steps are timed.

    Steps follow each other as they do in a text: every token is another, and the cache grows. Most
    of what a step costs on top of its products depends on both.

    Args:
        spec: The model.
        engines: Its engines.
        max_length: Tokens that the cache may hold.
        room: Tokens that a step adds at most.
        depth: Blocks that any step runs at most; all of them, if not given.
        clock: Seconds; another than the wall's where the machine is shared.
        drafts: The draft layer, where steps draft with it.

    Attributes:
        session: The sequence.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        max_length: int,
        room: int,
        depth: int | None = None,
        clock: Clock = time.perf_counter,
        drafts: DraftEngines | None = None,
    ) -> None:
        max_length = min(max_length, spec.rotary_switch or max_length)
        self._at_once = min(FOLLOWING, max_length) if engines.follows else 1
        room = max(room, self._at_once)
        self._past = min(PAST, max(0, max_length - room - _GROWTH))
        self._room, self._clock = room, clock
        length = min(max_length, self._past + room + _GROWTH)
        self.session = Session(spec, engines, 1, length, drafts=drafts)
        # Where blocks stand behind exits, states are kept there once an exit was asked. Steps of
        # full depth are timed without.
        self._whole = self.session
        if engines.exit_blocks is not None:
            self._whole = Session(spec, engines, 1, length)
        self._sessions = list(dict.fromkeys((self.session, self._whole)))
        self._full = {"full", spec.blocks}
        ids = np.random.default_rng(0).integers(spec.vocab_size, size=1009)
        self._ids = itertools.cycle(ids.tolist())
        if self._past:
            for session in self._sessions:
                session.advance([self.token() for _ in range(self._past)], depth or "full")

    def token(self) -> int:
        """Another token."""
        return int(next(self._ids))

    def steps(self, exits: Sequence[Exit | ExitPolicy]) -> list[Step]:
        """Steps at these exits, as text is generated: some as one, where engines begin ahead."""
        return [
            self.in_a_row(exits[at : at + self._at_once])
            for at in range(0, len(exits), self._at_once)
        ]

    def in_a_row(self, exits: Sequence[Exit | ExitPolicy]) -> Step:
        """Steps at these exits as one; each begins before the token before it is known.

        Where engines can't do that, and for the first, the token is made up.
        """
        whole = all(not isinstance(exit, ExitPolicy) and exit in self._full for exit in exits)
        session = self._whole if whole else self.session

        def run() -> None:
            ahead = None
            for at, exit in enumerate(exits):
                started = ahead or session.start([self.token()], exit)
                ahead = None
                if at + 1 < len(exits) and session.can_follow(started):
                    ahead = session.follow(started, exits[at + 1])
                session.finish(started)

        return run

    def time(
        self,
        kinds: Mapping[Kind, Sequence[Step]],
        rounds: int,
        seconds: float,
        what: str,
        progress: Progress,
    ) -> dict[Kind, NDArray[np.float64]]:
        """Runs every kind's steps, one after the other, in every round.

        A turn begins with the kind's last steps, untimed.

        Args:
            kinds: Steps by kind.
            rounds: Turns of each kind.
            seconds: No new round is begun after so many, but for the first three.
            what: Is being timed, for the progress.
            progress: Shows rounds.

        Returns:
            Milliseconds of each step, the medians over the rounds.
        """
        times: dict[Kind, list[list[float]]] = {kind: [] for kind in kinds}
        start = time.perf_counter()
        with progress.task(what, rounds, "rounds") as task:
            for turn in range(rounds):
                if turn < FEWEST_ROUNDS or time.perf_counter() < start + seconds:
                    for kind, steps in kinds.items():
                        times[kind].append(self._turn(steps))
                task.advance()
        return {kind: np.median(np.array(taken), axis=0) for kind, taken in times.items()}

    def _turn(self, steps: Sequence[Step]) -> list[float]:
        clock = self._clock
        for session in self._sessions:
            session.rewind(self._past)
        milliseconds = []
        for step in [*steps[-SETTLING:], *steps]:
            for session in self._sessions:
                if session.lengths[0] + self._room > session.max_length:
                    session.rewind(self._past)
            start = clock()
            step()
            milliseconds.append((clock() - start) * 1e3)
        return milliseconds[-len(steps) :]
