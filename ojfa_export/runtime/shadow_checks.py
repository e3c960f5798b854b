"""Telling of the tokens of a session, and comparing some of them with the full model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ojfa_export.decoding.events import ExitTaken, Listener, ShadowCheck
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.errors import UsageError
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence as TokenSequence
from ojfa_export.runtime.shadow import PendingCheck, Shadow
from ojfa_export.runtime.stats import Stats
from ojfa_export.system.arguments import whole_number

# Tokens that a comparison takes at a time: the logits of one take 4 V bytes.
_TOKENS_AT_ONCE = 32


class SessionState(Protocol):
    """What is looked at of a session; users may set it anew at any time."""

    shadow: Shadow | None
    on_event: Listener | None
    stats: Stats


class ShadowChecks:
    """The part of a session that watches it.

    Args:
        runner: Of the sequences; keeps what comes out of the last block.
        sequences: Of the session.
        session: Whose `shadow`, `on_event` and `stats` are looked at.
    """

    def __init__(
        self, runner: ModelRunner, sequences: Sequence[TokenSequence], session: SessionState
    ) -> None:
        self._runner, self._sequences, self._session = runner, sequences, session

    def run(self, budget: int | None) -> list[ShadowCheck]:
        """See `Session.run_shadow_checks`."""
        shadow = self._session.shadow
        if shadow is None:
            raise UsageError(
                "this session chooses no tokens for shadow checks",
                hint="make it with Model.session(monitor=...)",
            )
        if budget is not None:
            budget = whole_number("the budget of shadow checks", budget, 0)
        return self._compare(shadow, shadow.due[:budget])

    def _compare(self, shadow: Shadow, due: Sequence[PendingCheck]) -> list[ShadowCheck]:
        """Completes early tokens and compares them, oldest first."""
        blocks = self._runner.spec.blocks
        late = {each.row for each in due if self._is_pending(each)}
        if late:
            self._runner.run([self._sequences[row] for row in sorted(late)], blocks)
        checks = []
        for start in range(0, len(due), _TOKENS_AT_ONCE):
            part = due[start : start + _TOKENS_AT_ONCE]
            final = self._runner.pending[blocks]
            states = final[[each.row for each in part], [each.position for each in part]]
            self._session.stats.count_head(len(part), final=True)
            output = self._runner.engines.choose(states, blocks, HeadRequest())
            for each, choice in zip(part, output.likeliest(), strict=True):
                agrees = each.choice == choice
                checks.append(ShadowCheck(each.row, each.position, each.blocks_run, agrees))
                self._record(shadow, checks[-1])
        return checks

    def before_appending(self, new: Sequence[Sequence[int]]) -> None:
        """Compares what can't be compared later: beyond LongRoPE's switch the past is another."""
        session = self._session
        shadow, switch = session.shadow, self._runner.spec.rotary_switch
        if shadow is None or not shadow.due or switch is None:
            return
        both = zip(self._sequences, new, strict=True)
        # Of these alone: what the caller has asked of the others still waits as it was.
        crossing = {
            sequence.slot
            for sequence, ids in both
            if len(sequence) <= switch < len(sequence) + len(ids)
        }
        due = [each for each in shadow.due if each.row in crossing]
        if due:
            self._compare(shadow, due)

    def watch(
        self, row: int, depth: int, likeliest: int | None, confidence: tuple[float, ...] = ()
    ) -> None:
        """Tells of a sequence's newest token and what its head found likeliest; may choose it."""
        session, position = self._session, len(self._sequences[row]) - 1
        if session.on_event is not None:
            session.on_event(ExitTaken(row, position, depth, confidence))
        shadow = session.shadow
        if shadow is None or likeliest is None or not shadow.choose():
            return
        if depth < self._runner.spec.blocks:
            shadow.add(PendingCheck(row, position, depth, likeliest))
        else:
            self._record(shadow, ShadowCheck(row, position, depth, True))

    def _is_pending(self, due: PendingCheck) -> bool:
        last_block = self._runner.spec.blocks - 1
        return self._sequences[due.row].marks[last_block] <= due.position

    def _record(self, shadow: Shadow, check: ShadowCheck) -> None:
        session = self._session
        shadow.record(check)
        if check.blocks_run < self._runner.spec.blocks:
            session.stats.shadow_checks += 1
            session.stats.shadow_disagreements += not check.agrees
        if session.on_event is not None:
            session.on_event(check)
