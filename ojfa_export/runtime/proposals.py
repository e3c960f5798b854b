"""What a session's draft layer proposes."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.errors import UsageError
from ojfa_export.runtime.runner import ModelRunner
from ojfa_export.runtime.sequence import Sequence


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
