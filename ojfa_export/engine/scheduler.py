"""Which requests run next, and how deep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ojfa_export.engine.costs import PassCosts
from ojfa_export.engine.running import Running

# More pending tokens than this are run in pieces, between the steps of others.
LONGEST_STEP = 16
LEAST_PIECE, FIRST_PIECE, MOST_PIECE = 16, 32, 512
# Passes that a request may wait at an exit until more have come there.
MOST_WAITS = 4


@dataclass(slots=True)
class Work:
    """What runs next.

    Attributes:
        running: Whose sequences.
        entry: The first block that runs.
        depth: Blocks that their tokens run to.
        stops: One past the last token of each that runs.
    """

    running: list[Running]
    entry: int
    depth: int
    stops: list[int] = field(default_factory=list)


class Scheduler:
    """Chooses the next work among requests that all wait for something.

    Requests whose few pending tokens wait before the same block run together as far as the first of
    them needs: those that are answered there leave, the others go on. The deepest go first, so that
    all begin their next tokens together. Where a pass of few tokens costs nearly what one of many
    does, and enough others can begin meanwhile, those at an exit wait until more have come there
    (DREX, arXiv 2512.15705, rebatches by measured times as well).

    Long prompts run in pieces that take about as long as a step of the others, in turns with them.

    Args:
        blocks: Of the model.
        costs: Of passes, as they are measured.
        piece: Tokens of a long prompt that run at once; None to adapt it.
    """

    def __init__(self, blocks: int, costs: PassCosts, piece: int | None = None) -> None:
        self._blocks, self._costs, self._piece = blocks, costs, piece
        self._prompt_is_next = False

    def next(self, running: Sequence[Running]) -> Work | None:
        """The next work; None where no request needs anything."""
        short: list[Running] = []
        long: list[Running] = []
        for each in running:
            (short if each.pending <= LONGEST_STEP else long).append(each)
        if long and (self._prompt_is_next or not short):
            self._prompt_is_next = False
            return self._prompt(long[0], short)
        self._prompt_is_next = True
        return self._step(short) if short else None

    def _step(self, running: Sequence[Running]) -> Work:
        groups: dict[int, list[Running]] = {}
        for each in running:
            groups.setdefault(each.entry, []).append(each)
        entry = self._choose(groups)
        for block, group in groups.items():
            for each in group:
                each.waits = 0 if block == entry else each.waits + 1
        chosen = groups[entry]
        depth = min(each.ask.depth for each in chosen)
        return Work(chosen, entry, depth, [len(each.sequence) for each in chosen])

    def _choose(self, groups: dict[int, list[Running]]) -> int:
        """The block before which the tokens wait that run next."""
        deepest, shallowest = max(groups), min(groups)
        if deepest == shallowest:
            return deepest
        knee = self._costs.knee
        waits = max(each.waits for each in groups[deepest])
        worthwhile = len(groups[deepest]) >= knee or len(groups[shallowest]) < knee
        return deepest if worthwhile or waits >= MOST_WAITS else shallowest

    def _prompt(self, each: Running, others: Sequence[Running]) -> Work:
        depth, length = each.ask.depth, len(each.sequence)
        start = each.sequence.marks[depth - 1]
        stop = min(length, start + self._piece_tokens(len(others)))
        # The last piece has all tokens whose logits are wanted.
        if stop < length < stop + each.ask.rows:
            stop = length - each.ask.rows
        return Work([each], each.entry, depth, [stop if stop > start else length])

    def _piece_tokens(self, others: int) -> int:
        """About as many as run in the time of a step of the others."""
        if not others:
            return MOST_PIECE
        if self._piece is not None:
            return self._piece
        step = self._costs.seconds(others, self._blocks)
        token = self._costs.token_seconds(self._blocks)
        if step is None or token is None:
            return FIRST_PIECE
        return int(min(MOST_PIECE, max(LEAST_PIECE, step / token)))
