"""What a session's draft layer proposes."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ojfa_export.backends.draft import Drafts
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.errors import UsageError
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import UNKNOWN, Sequence

Lists = list[list[int]]


@dataclass(frozen=True, eq=False)
class Round:
    """Drafts and the pass that checks them, under way.

    Attributes:
        rows: Of the batch, with new tokens.
        limits: Of each row of the batch, drafts at most.
        sequences: Of those rows.
        drafting: Those of them that draft.
        lengths: Of these, before the drafts.
        drafts: Of these; None where nobody drafts.
        output: What the full model says.
        counts: After how many of each sequence's newest tokens.
    """

    rows: Many[int]
    limits: Many[int]
    sequences: list[Sequence]
    drafting: list[Sequence]
    lengths: list[int]
    drafts: Drafts | None
    output: HeadOutput
    counts: list[int]


class Proposals:
    """Drafts of a batch; see `Session.propose`.

    Args:
        runner: Of the sequences, with a drafter where there is a draft layer.
        sequences: By row.
    """

    def __init__(self, runner: ModelRunner, sequences: Many[Sequence]) -> None:
        self._runner, self._sequences = runner, sequences

    def can_begin(self, sequence: Sequence) -> bool:
        """Whether a sequence's next token may be the first of a round of drafts."""
        if sequence.drafting is None or not sequence.room_before_switch:
            return False
        return 0 < sequence.marks[sequence.drafting.depth - 1] == len(sequence)

    def check(self, new: Many[Many[int]]) -> list[int]:
        """Rows with new tokens.

        Args:
            new: Tokens that are about to be appended.

        Raises:
            UsageError: The draft layer can't go on from there.
        """
        rows = [row for row, ids in enumerate(new) if ids]
        for row in rows:
            if len(new[row]) != 1 or not self._can_take_one(self._sequences[row]):
                raise UsageError(
                    f"the draft layer can't draft after {len(new[row])} tokens of sequence {row}",
                    hint="give it one token, after all before it have run at full depth",
                )
        return rows

    def tokens(self, rows: Many[int]) -> list[int]:
        """The likeliest token after the newest of each row; -1 for the other rows."""
        tokens = [-1] * len(self._sequences)
        drafter = self._runner.drafter
        if rows and drafter is not None:
            hidden = drafter.run([self._sequences[row] for row in rows])
            likeliest = drafter.engines.choose(hidden, 0, HeadRequest()).likeliest()
            for row, token in zip(rows, likeliest, strict=True):
                tokens[row] = token
        return tokens

    def begin(self, rows: Many[int], limits: Many[int]) -> Round:
        """Drafts after the newest tokens of rows, and completes them.

        Where all draft, nothing is waited for; drafts that the host doesn't know are UNKNOWN in
        their sequences then.

        Args:
            rows: With tokens that have not run.
            limits: Of each row of the batch, drafts at most; 0 where none can be made.
        """
        sequences, drafter = [self._sequences[row] for row in rows], self._runner.drafter
        drafting = [self._sequences[row] for row in rows if limits[row]]
        lengths = [len(each) for each in drafting]
        drafts = None
        if drafting and drafter is not None:
            drafts = drafter.chain(drafting, max(limits))
        try:
            output, counts = self._complete(sequences, drafting, drafts)
        except BaseException:
            for each, length in zip(drafting, lengths, strict=True):
                each.truncate(length)
            raise
        return Round(rows, limits, sequences, drafting, lengths, drafts, output, counts)

    def finish(self, begun: Round) -> tuple[Lists, Lists]:
        """Waits for a round.

        Returns:
            Of each row of the batch its drafts, and the full model's tokens after the newest token
            and after each draft, or after more.
        """
        try:
            if begun.drafts is not None:
                for each, ids in zip(begun.drafting, begun.drafts.drafts(), strict=True):
                    each.tokens[-len(ids) :] = ids
            likeliest = iter(begun.output.likeliest())
        except BaseException:
            for each, length in zip(begun.drafting, begun.lengths, strict=True):
                each.truncate(length)
            raise
        found: Lists = [[] for _ in self._sequences]
        best: Lists = [[] for _ in self._sequences]
        for row, each, count in zip(begun.rows, begun.sequences, begun.counts, strict=True):
            best[row] = list(islice(likeliest, count))
            found[row] = each.tokens[len(each) - count + 1 :][: begun.limits[row]]
        return found, best

    def _complete(
        self, sequences: Many[Sequence], drafting: Many[Sequence], drafts: Drafts | None
    ) -> tuple[HeadOutput, list[int]]:
        """What the full model says after the newest tokens, and how many of each that are.

        Where all draft, the pass begins before the drafts are on the host.
        """
        if drafts is None:
            counts = [1] * len(sequences)
            return self._runner.check(sequences, counts), counts
        ahead = len(drafting) == len(sequences)
        unknown = [[UNKNOWN] * drafts.count for _ in drafting]
        for each, ids in zip(drafting, unknown if ahead else drafts.drafts(), strict=True):
            each.append(ids)
        slots = {each.slot for each in drafting}
        counts = [1 + drafts.count * (each.slot in slots) for each in sequences]
        return self._runner.check(sequences, counts, drafts if ahead else None), counts

    def logits(self, rows: Many[int]) -> Float32:
        """The same as logits [sequences, V]; zero for the other rows."""
        shape = (len(self._sequences), self._runner.spec.vocab_size)
        logits = np.zeros(shape, np.float32)
        drafter = self._runner.drafter
        if rows and drafter is not None:
            hidden = drafter.run([self._sequences[row] for row in rows])
            logits[rows] = drafter.engines.logits(hidden, 0)
        return logits

    def _can_take_one(self, sequence: Sequence) -> bool:
        if self.can_begin(sequence):
            return True
        drafting, room = sequence.drafting, sequence.room_before_switch
        return drafting is not None and room > 0 and drafting.can_go_on(len(sequence))
