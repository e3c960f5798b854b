"""Sequences that somebody watches: events, and tokens compared with the full model."""

from __future__ import annotations

from collections.abc import Sequence

from ojfa_export.backends.backend import Engines
from ojfa_export.backends.choice import Choosing
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.answers import Answers
from ojfa_export.runtime.events import ExitTaken, Listener, ShadowCheck
from ojfa_export.runtime.shadow import Due, Shadow

# Rows that a comparison takes at a time: the logits of one take 4 V bytes.
_ROWS_AT_ONCE = 32


class Watched(Answers):
    """Sequences whose passes are told of, and some of whose tokens are compared; see `Session`."""

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        batch_size: int,
        max_length: int,
        shadow: Shadow | None = None,
    ) -> None:
        super().__init__(spec, engines, batch_size, max_length, keep_final=shadow is not None)
        self.shadow = shadow
        self.on_event: Listener | None = None

    def run_shadow_checks(self, budget: int | None = None) -> list[ShadowCheck]:
        """Completes chosen early tokens to full depth and compares them with the full model.

        To be called when the machine has nothing better to do: between tokens, or after the
        sequence. Completing is the catching up that a later, deeper token would have caused, so
        that later tokens are the same with checks as without. All tokens of a sequence that wait
        are completed in one pass.

        Args:
            budget: Comparisons at most, oldest tokens first; None for all that are due.

        Returns:
            The comparisons; `stats` counts them.

        Raises:
            UsageError: The session was made without a `shadow`, or a negative budget.
        """
        if self.shadow is None or self._final is None:
            raise UsageError(
                "this session chooses no tokens for shadow checks",
                hint="make it with Model.session(monitor=...)",
            )
        if budget is not None and budget < 0:
            raise UsageError(f"the budget of shadow checks must be 0 or more, not {budget}")
        due, blocks = self.shadow.due[:budget], self.spec.blocks
        waiting = [False] * self.batch_size
        for each in due:
            waiting[each.row] |= self._watermarks[each.row][blocks - 1] <= each.position
        for rows in self._groups(waiting, blocks):
            self._deepen(rows, blocks, waiting)
        checks = []
        for start in range(0, len(due), _ROWS_AT_ONCE):
            part = due[start : start + _ROWS_AT_ONCE]
            states = self._final[[each.row for each in part], [each.position for each in part]]
            choices = self._choose(states, blocks, Choosing()).likeliest()
            for each, choice in zip(part, choices, strict=True):
                agrees = each.choice == choice
                checks.append(ShadowCheck(each.row, each.position, each.blocks_run, agrees))
                self._checked(self.shadow, checks[-1])
        return checks

    def rewind(self, length: int, row: int = 0) -> None:
        """Drops the tokens after the first `length`: a change of numbers, nothing is computed.

        Raises:
            UsageError: A row that isn't there, or more tokens than it has.
        """
        long = self._long_context(row) if 0 <= row < self.batch_size else False
        super().rewind(length, row)
        if self.shadow is not None:
            # What was said with the long factors can't be compared once they no longer apply.
            self.shadow.forget(row, 0 if long != self._long_context(row) else length)

    def _append(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[int]:
        switch = self.spec.rotary_switch
        if self.shadow is not None and self.shadow.due and switch is not None:
            both = zip(self.lengths, self._check(token_ids), strict=True)
            if any(length <= switch < length + len(ids) for length, ids in both):
                self.run_shadow_checks()  # beyond the switch the full model's past is another
        return super()._append(token_ids)

    def _watch(
        self, row: int, depth: int, likeliest: int | None, confidence: tuple[float, ...] = ()
    ) -> None:
        """Tells of a sequence's newest token and what its head found likeliest; may choose it."""
        position = len(self._tokens[row]) - 1
        if self.on_event is not None:
            self.on_event(ExitTaken(row, position, depth, confidence))
        if self.shadow is None or likeliest is None or not self.shadow.choose():
            return
        if depth < self.spec.blocks:
            self.shadow.add(Due(row, position, depth, likeliest))
        else:
            self._checked(self.shadow, ShadowCheck(row, position, depth, True))

    def _checked(self, shadow: Shadow, check: ShadowCheck) -> None:
        shadow.record(check)
        if check.blocks_run < self.spec.blocks:
            self.stats.shadow_checks += 1
            self.stats.shadow_disagreements += not check.agrees
        if self.on_event is not None:
            self.on_event(check)
