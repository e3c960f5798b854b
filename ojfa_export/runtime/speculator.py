"""Decoding with drafts: a session drafts at an exit and verifies with the remaining blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.events import DraftChecked
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import (
    DraftLength,
    Float64,
    Speculation,
    agreeing,
    check,
    draw,
)
from ojfa_export.runtime.decoding import Chosen, StepByStep
from ojfa_export.runtime.rounds_ahead import RoundsAhead
from ojfa_export.runtime.session import Session


class Speculator:
    """Several tokens per full pass; a `decoding.Decoder`.

    Args:
        session: With a sequence for each generator.
        speculation: How to draft; what a draft costs is named for a draft layer.
        sampling: How tokens are chosen; drafts are drawn from the exit's distribution after the
            same temperature, top-k and top-p.
        generators: Random numbers of each sequence.
        eos_token_ids: After one of these nothing is drafted.
        ahead: Whether a round may begin before it is asked for. Else the session may be rewound
            between two rounds.
    """

    def __init__(
        self,
        session: Session,
        speculation: Speculation,
        sampling: Sampling,
        generators: Sequence[np.random.Generator],
        eos_token_ids: Sequence[int] = (),
        *,
        ahead: bool = True,
    ) -> None:
        self._session, self._sampling, self._generators = session, sampling, generators
        self._exit = speculation.resolve_exit(
            session.spec.blocks, has_layer=session.has_drafts, served=session.exits
        )
        self._fixed = speculation.draft
        draft_cost = speculation.draft_cost
        if draft_cost is None:
            draft_cost = max(1, self._exit) / session.spec.blocks
        cost = draft_cost + speculation.check_cost
        self._lengths = [
            DraftLength(
                cost,
                speculation.round_cost,
                speculation.acceptance,
                check_cost=speculation.check_cost,
            )
            for _ in generators
        ]
        self._eos = frozenset(eos_token_ids)
        at_once = sampling.temperature == 0 and self._exit == 0 and session.proposes_at_once
        # On a device a round is begun before it is asked for, and rounds without drafts are plain
        # steps, of which one may begin before the last has ended.
        self._rounds = RoundsAhead(session) if at_once else None
        self._ahead = ahead
        self._plain = StepByStep(session, "full", sampling, generators) if at_once else None
        # How much to draft next, where that was asked for already.
        self._planned: tuple[list[list[int]], list[int]] | None = None

    def step(self, pending: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[list[Chosen]]:
        """See `decoding.Decoder`: each sequence's accepted drafts, and one token of its own."""
        if self._rounds is not None and self._plain is not None:
            return self._step_ahead(self._rounds, self._plain, pending, wanted)
        before, limits = self._session.lengths, self._limits(pending, wanted)
        drafts, proposals = self._draft(pending, limits)
        missing = [draft[-1:] or list(ids) for draft, ids in zip(drafts, pending, strict=True)]
        both = zip(drafts, pending, strict=True)
        counts = [len(draft) + 1 if ids else 0 for draft, ids in both]
        best, logits = self._complete(missing, counts)
        result: list[list[int]] = [[] for _ in pending]
        for row, draft in ((row, drafts[row]) for row, ids in enumerate(pending) if ids):
            if self._sampling.temperature:
                result[row] = check(
                    draft, proposals[row], logits[row], self._sampling, self._generators[row]
                )
            else:
                result[row] = agreeing(draft, best[row])
        self._keep(before, pending, drafts, result)
        return self._told(drafts, result)

    def _step_ahead(
        self,
        rounds: RoundsAhead,
        plain: StepByStep,
        pending: Sequence[Sequence[int]],
        wanted: Sequence[int],
    ) -> list[list[Chosen]]:
        begun = rounds.take(pending)
        if begun is None:
            limits = self._limits(pending, wanted)
            if not any(limits):
                rest = all(self._lengths[row].rests for row, ids in enumerate(pending) if ids)
                return plain.step(pending, wanted if rest else [1] * len(pending))
            plain.end()
            begun = rounds.begin(pending, limits)
        found, best = self._session.finish_round(begun.round)
        drafts = [self._to_eos(draft) for draft in found]
        result = [
            agreeing(draft, likeliest) if ids else []
            for draft, likeliest, ids in zip(drafts, best, pending, strict=True)
        ]
        self._keep(begun.before, pending, drafts, result)
        if self._ahead:
            self._begin_ahead(rounds, result, wanted)
        return self._told(drafts, result)

    def _begin_ahead(
        self, rounds: RoundsAhead, result: list[list[int]], wanted: Sequence[int]
    ) -> None:
        """Begins the next round, if none of the sequences is known to end here."""
        lengths = self._session.lengths
        for row, tokens in enumerate(result):
            full = lengths[row] >= self._session.max_length or wanted[row] <= len(tokens)
            if tokens and (full or not self._eos.isdisjoint(tokens)):
                return
        pending = [tokens[-1:] for tokens in result]
        left = [count - len(tokens) for count, tokens in zip(wanted, result, strict=True)]
        limits = self._limits(pending, left)
        if any(limits):
            rounds.begin_ahead(pending, limits)
        else:
            self._planned = pending, limits

    def _keep(
        self,
        before: Sequence[int],
        pending: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        result: Sequence[Sequence[int]],
    ) -> None:
        """Drops the drafts that weren't taken, and learns from what was."""
        for row, tokens in enumerate(result):
            if tokens:
                accepted = len(tokens) - 1
                self._session.rewind(before[row] + len(pending[row]) + accepted, row)
                self._lengths[row].learn(accepted, len(drafts[row]))

    def _told(
        self, drafts: Sequence[Sequence[int]], result: Sequence[Sequence[int]]
    ) -> list[list[Chosen]]:
        """The tokens; statistics and whoever listens are told of them."""
        session, blocks = self._session, self._session.spec.blocks
        for row, tokens in enumerate(result):
            if not tokens:
                continue
            accepted = len(tokens) - 1
            session.stats.drafted += len(drafts[row])
            session.stats.accepted += accepted
            session.stats.rounds += 1
            if session.on_event is not None:
                session.on_event(DraftChecked(row, len(drafts[row]), accepted))
        return [
            [Chosen(token, blocks, index < len(tokens) - 1) for index, token in enumerate(tokens)]
            for tokens in result
        ]

    def end(self) -> None:
        """See `decoding.Decoder`."""
        if self._rounds is not None and self._plain is not None:
            self._rounds.end()
            self._plain.end()

    def _complete(
        self, missing: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> tuple[list[list[int]], list[Float32]]:
        """The full model's own tokens; where tokens are sampled its logits instead."""
        if self._sampling.temperature:
            return [], self._session.complete(missing, counts)
        return self._session.complete_greedily(missing, counts), []

    def _to_eos(self, draft: list[int]) -> list[int]:
        """Drafts up to an end of text, after which none counts."""
        ends = (index for index, token in enumerate(draft) if token in self._eos)
        return draft[: next(ends, len(draft)) + 1]

    def _limits(self, pending: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[int]:
        """How many tokens to draft for each sequence at most."""
        planned, self._planned = self._planned, None
        if planned is not None and [list(ids) for ids in pending] == planned[0]:
            return planned[1]
        together = 1 if self._sampling.temperature else sum(1 for ids in pending if ids)
        if self._plain is not None and self._plain.is_ahead:
            # All rest: the step that was begun drafts nothing, and its token is in the session.
            return [
                self._lengths[row].next(together) if ids else 0 for row, ids in enumerate(pending)
            ]
        return [
            self._draft_length(row, len(ids), wanted[row], together) if ids else 0
            for row, ids in enumerate(pending)
        ]

    def _draft_length(self, row: int, new: int, wanted: int, together: int) -> int:
        """As many as pay, are wanted, and fit behind so many new tokens.

        A draft layer has nothing to go on before the prompt has run: the first round drafts none.
        """
        if self._exit == 0 and (new > 1 or not self._session.can_propose(row)):
            return 0
        length = self._session.lengths[row] + new
        limit = min(wanted - 1, self._session.max_length - length)
        switch = self._session.spec.rotary_switch
        if switch is not None and length <= switch:
            # Longer, all positions would be rotated by the long factors, these ones too.
            limit = min(limit, switch - length)
        return min(limit, self._fixed or self._lengths[row].next(together))

    def _draft(
        self, pending: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> tuple[list[list[int]], list[list[Float64]]]:
        """Drafts and the distributions they were drawn from; the last are not in the session."""
        drafts: list[list[int]] = [[] for _ in pending]
        proposals: list[list[Float64]] = [[] for _ in pending]
        new = [list(ids) if limit else [] for ids, limit in zip(pending, limits, strict=True)]
        while any(new):
            propose = self._propose(new, proposals)
            for row in (row for row, ids in enumerate(new) if ids):
                token = propose[row]
                drafts[row].append(token)
                more = len(drafts[row]) < limits[row] and token not in self._eos
                new[row] = [token] if more else []
        return drafts, proposals

    def _propose(
        self, new: Sequence[Sequence[int]], proposals: Sequence[list[Float64]]
    ) -> list[int]:
        """Each sequence's next draft; the distribution that it was drawn from joins the others."""
        session, exit = self._session, self._exit
        if self._sampling.temperature == 0:
            return session.choose(new, exit).tokens if exit else session.propose(new)
        logits = session.advance(new, exit) if exit else session.propose_logits(new)
        tokens = [-1] * len(new)
        for row in (row for row, ids in enumerate(new) if ids):
            proposals[row].append(self._sampling.probabilities(logits[row]))
            tokens[row] = draw(proposals[row][-1], self._generators[row])
        return tokens
