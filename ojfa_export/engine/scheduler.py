"""Which requests run next, and how deep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

from ojfa_export.engine.costs import LEAST_PIECE, PassCosts
from ojfa_export.engine.next_step import NextStep
from ojfa_export.engine.running import Running

# More pending tokens than this are run in pieces, between the steps of others.
LONGEST_STEP = 16
# What pieces may add to a step, over the time of the step alone; where passes are filled up to few
# sizes; and where many prompts wait. Of few sizes one adds about half a step, which at that limit
# was now taken and now not: first tokens came twice as late (simulated: docs/scaling.md).
PIECE_SHARE, FILLED_SHARE, MOST_SHARE = 0.5, 0.85, 2.0
# Passes that a request may wait at an exit until more have come there.
MOST_WAITS = 4


@dataclass(slots=True)
class Work:
    """What runs next.

    Attributes:
        running: Whose sequences.
        entry: The first block that runs.
        depths: Blocks that the tokens of each run to.
        stops: One past the last token of each that runs.
        prompts: Of those that run, the last ones with pieces of long prompts.
        prompt_tokens: Tokens of these pieces.
    """

    running: list[Running] = field(default_factory=list)
    entry: int = 0
    depths: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    prompts: int = 0
    prompt_tokens: int = 0

    @property
    def beside(self) -> tuple[int, int]:
        """Requests that run without a piece, and tokens of pieces."""
        return len(self.running) - self.prompts, self.prompt_tokens

    @property
    def blocks(self) -> int:
        """Blocks that run."""
        return max(self.depths) - self.entry

    @property
    def steps(self) -> list[NextStep | None]:
        """What each gets an output to; None where it is not yet where it wants to be."""
        return [
            each.step if each.step.depth == depth and stop == len(each.sequence) else None
            for each, depth, stop in zip(self.running, self.depths, self.stops, strict=True)
        ]

    def add(self, each: Running, depth: int, stop: int) -> None:
        """Takes a request."""
        self.running.append(each)
        self.depths.append(depth)
        self.stops.append(stop)

    def keep(self, wanted: Sequence[bool]) -> None:
        """Drops the others."""
        self.running = list(compress(self.running, wanted))
        self.depths = list(compress(self.depths, wanted))
        self.stops = list(compress(self.stops, wanted))


class Scheduler:
    """Chooses the next work among requests that all wait for something.

    Requests whose few pending tokens wait before the same block run together, each as deep as it
    needs, and their heads are asked at the end. Where an output decides whether tokens go deeper,
    all stop at the first such exit: those that leave are done, the others go on. The deepest go
    first, so that all begin their next tokens together. Where a pass of few tokens costs nearly
    what one of many does, and enough others can begin meanwhile, those at an exit wait until more
    have come there (DREX, arXiv 2512.15705, rebatches by measured times as well).

    Long prompts run in pieces beside steps that begin at the first block: a pass with pieces takes
    about as long as two without.

    Args:
        blocks: Of the model.
        costs: Of passes, as they are measured.
        piece: Tokens of long prompts that run beside steps; None to adapt them.
    """

    def __init__(self, blocks: int, costs: PassCosts, piece: int | None = None) -> None:
        self._blocks, self._costs, self._piece = blocks, costs, piece

    def next(self, running: Sequence[Running], *, is_full: bool = False) -> Work | None:
        """The next work; None where no request needs anything.

        Args:
            running: Requests that have a slot.
            is_full: Whether others wait for one, so that what all take together matters most.
        """
        short: list[Running] = []
        long: list[Running] = []
        for each in running:
            (short if each.pending <= LONGEST_STEP else long).append(each)
        if not short and not long:
            return None
        work = self._step(short) if short else Work(entry=min(each.entry for each in long))
        if long and (not short or not work.entry):
            self._add_prompts(work, long, is_full)
        return work

    def _step(self, running: Sequence[Running]) -> Work:
        groups: dict[int, list[Running]] = {}
        for each in running:
            groups.setdefault(each.entry, []).append(each)
        entry = self._choose(groups)
        for block, group in groups.items():
            for each in group:
                each.waits = 0 if block == entry else each.waits + 1
        chosen = groups[entry]
        limit = min(
            (each.step.depth for each in chosen if each.step.check is not None),
            default=self._blocks,
        )
        work = Work(entry=entry)
        for each in chosen:
            work.add(each, min(each.step.depth, limit), len(each.sequence))
        return work

    def _choose(self, groups: dict[int, list[Running]]) -> int:
        """The block before which the tokens wait that run next."""
        deepest, shallowest = max(groups), min(groups)
        if deepest == shallowest:
            return deepest
        knee = self._costs.knee
        waits = max(each.waits for each in groups[deepest])
        worthwhile = len(groups[deepest]) >= knee or len(groups[shallowest]) < knee
        return deepest if worthwhile or waits >= MOST_WAITS else shallowest

    def _add_prompts(self, work: Work, prompts: Sequence[Running], is_full: bool) -> None:
        """Adds pieces of long prompts, in their order, as many as make a pass of good length."""
        left = self._prompt_tokens(len(prompts), len(work.running), is_full)
        if not left:
            return
        for each in prompts:
            depth, length = each.step.depth, len(each.sequence)
            start = each.sequence.marks[depth - 1]
            stop = min(length, start + left)
            # The last piece has all tokens whose logits are wanted.
            if stop < length < stop + each.step.rows:
                stop = length - each.step.rows
            if stop <= start:
                stop = length
            work.add(each, depth, stop)
            work.prompts += 1
            work.prompt_tokens += stop - start
            left -= stop - start
            if left < LEAST_PIECE:
                return

    def _prompt_tokens(self, prompts: int, others: int, is_full: bool) -> int:
        """A piece; more where several prompts wait, as they keep others from decoding together.

        0 where the step of the others is to be measured alone first.
        """
        pieces = self._costs.pieces
        if not others:
            return pieces.most
        if self._piece is not None:
            return self._piece
        share = FILLED_SHARE if pieces.are_filled else PIECE_SHARE
        share *= max(1, prompts // 2, prompts // others)
        return pieces.choose(others, min(MOST_SHARE, share), MOST_SHARE if is_full else 0.0)
