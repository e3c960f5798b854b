"""Passes that end in a head: logits for the host, or choices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal, overload

import numpy as np

from ojfa_export.backends.backend import Engines, Float32, Hidden
from ojfa_export.backends.choice import Choices, Choosing
from ojfa_export.errors import UsageError
from ojfa_export.families.spec import ModelSpec
from ojfa_export.runtime.sequences import Sequences
from ojfa_export.runtime.stats import Stats


class Answers(Sequences):
    """Sequences whose newest tokens a head is asked about; see `Sequences` for what passes do.

    Args:
        spec: The model.
        engines: The opened engines.
        batch_size: Sequences.
        max_length: Tokens that a sequence may hold.
        keep_final: Whether to keep the hidden states that come out of the last block.

    Attributes:
        stats: What has been done.
    """

    def __init__(
        self,
        spec: ModelSpec,
        engines: Engines,
        batch_size: int,
        max_length: int,
        *,
        keep_final: bool = False,
    ) -> None:
        super().__init__(spec, engines, batch_size, max_length, keep_final=keep_final)
        self.stats = Stats()
        self._engines = engines

    def complete(self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Float32]:
        """Appends tokens and runs all that waits, and them, through all blocks.

        Args:
            token_ids: New tokens of each sequence.
            counts: For how many of each sequence's last tokens to give logits: no more than the
                last block hasn't processed. A sequence with 0 and no new tokens is left alone.

        Returns:
            Logits [count, V] of the model's own head for each sequence.

        Raises:
            UsageError: A token outside the model, no room in the cache, or too large a count; the
                session is unchanged.
        """
        self._append_before_completing(token_ids, counts)
        return self._run(counts, self.spec.blocks, True)

    def complete_greedily(
        self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[list[int]]:
        """As `complete`, with the token of the largest logit in place of each row of logits."""
        self._append_before_completing(token_ids, counts)
        states = self._every(counts, self.spec.blocks)
        if not len(states):
            return [[] for _ in counts]
        best = iter(self._choose(states, self.spec.blocks, Choosing()).likeliest())
        return [list(islice(best, count)) for count in counts]

    def _append_before_completing(
        self, token_ids: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> None:
        new = self._check(token_ids)
        for row, (count, ids) in enumerate(zip(counts, new, strict=True)):
            last_mark = self._watermarks[row][self.spec.blocks - 1]
            waiting = len(self._tokens[row]) - last_mark + len(ids)
            if not min(len(ids), 1) <= count <= waiting:
                raise UsageError(
                    f"asked for the logits of {count} tokens of sequence {row}, of which "
                    f"{waiting} wait for the last block"
                )
        self._append(new)

    @overload
    def _run(
        self, counts: Sequence[int], depth: int, every_position: Literal[True]
    ) -> list[Float32]: ...

    @overload
    def _run(
        self, counts: Sequence[int], depth: int, every_position: bool
    ) -> Float32 | list[Float32]: ...

    def _run(
        self, counts: Sequence[int], depth: int, every_position: bool
    ) -> Float32 | list[Float32]:
        """Runs the first blocks and a head; logits of each sequence's last `counts` tokens."""
        if every_position:
            states = self._every(counts, depth)
            return np.split(self._logits(states, depth), np.cumsum(counts)[:-1])
        wanted = [count > 0 for count in counts]
        answers = self._logits(self._newest(wanted, depth), depth)
        if len(answers) == self.batch_size:
            return answers
        logits = np.zeros((self.batch_size, self.spec.vocab_size), np.float32)
        logits[np.array(wanted)] = answers
        return logits

    def _newest(self, wanted: Sequence[bool], depth: int) -> Hidden:
        """Runs sequences through the first blocks; hidden states [wanted, H] of their newest."""
        arrays, newest = self._cache.arrays, []
        for rows in self._groups(wanted, depth):
            hidden = self._deepen(rows, depth, wanted)
            last = hidden.reshape(len(hidden), -1) if hidden.shape[1] == 1 else hidden[:, -1]
            if all(wanted[rows]):
                if len(last) == sum(wanted):
                    return arrays.ascontiguousarray(last)
                newest.append(last.copy())  # the next pass may write where it lies
            else:
                newest.append(last[np.flatnonzero(wanted[rows])])
        if not newest:
            return arrays.empty((0, self.spec.hidden_size), np.float32)
        return arrays.concatenate(newest)

    def _every(self, counts: Sequence[int], depth: int) -> Hidden:
        """Runs sequences through the first blocks; hidden states of their last `counts` tokens."""
        arrays, wanted = self._cache.arrays, [count > 0 for count in counts]
        states = [arrays.empty((0, self.spec.hidden_size), np.float32)] * self.batch_size
        for rows in self._groups(wanted, depth):
            hidden = self._deepen(rows, depth, wanted)
            for row in range(rows.start, rows.stop):
                if wanted[row]:
                    states[row] = hidden[row - rows.start, -counts[row] :].copy()
        return arrays.concatenate(states)

    def _logits(self, hidden: Hidden, depth: int) -> Float32:
        """Logits [n, V] of hidden states [n, H] after `depth` blocks."""
        if not len(hidden):
            return np.zeros((0, self.spec.vocab_size), np.float32)
        self._count(len(hidden), depth)
        return self._engines.logits(hidden, depth)

    def _choose(self, hidden: Hidden, depth: int, how: Choosing) -> Choices:
        """Chooses a token for each of the hidden states [n, H] after `depth` blocks; n > 0."""
        self._count(len(hidden), depth)
        return self._engines.choose(hidden, depth, how)

    def _count(self, rows: int, depth: int) -> None:
        self.stats.count_head(rows, final=depth == self.spec.blocks)
