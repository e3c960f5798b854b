"""Token ids as callers give them: for one sequence, or a list for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ojfa_export.errors import UsageError
from ojfa_export.runtime.sequence import Sequence as TokenSequence
from ojfa_export.system.arguments import is_whole, listed, whole_number

TokenIds = Sequence[int] | Sequence[Sequence[int]]


def check_tokens(
    token_ids: TokenIds, sequences: Sequence[TokenSequence], max_length: int, vocab_size: int
) -> list[list[int]]:
    """New tokens of each sequence.

    Args:
        token_ids: Of the one sequence, or a list for each.
        sequences: Which they are appended to.
        max_length: Tokens that a sequence may hold.
        vocab_size: Tokens of the model.

    Raises:
        UsageError: Another number of sequences, too many tokens, or one outside the model.
    """
    new = _listed(token_ids)
    if len(new) != len(sequences):
        raise UsageError(
            f"got tokens for {len(new)} sequences, the session has {len(sequences)}",
            hint="give one list of token ids per sequence",
        )
    for row, (ids, sequence) in enumerate(zip(new, sequences, strict=True)):
        length = len(sequence) + len(ids)
        if length > max_length:
            raise UsageError(
                f"sequence {row} would have {length} tokens, the cache holds {max_length}",
                hint="shorten it, or build the bundle with a larger --max-cache-length",
            )
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UsageError(
                f"sequence {row} has token ids outside 0..{vocab_size - 1}",
                hint="was the text encoded with another model's tokenizer?",
            )
    return new


def check_counts(
    counts: Sequence[int], new: Sequence[Sequence[int]], pending: Sequence[int]
) -> list[int]:
    """For how many of each sequence's last tokens logits of the last block are wanted.

    Args:
        counts: As given.
        new: New tokens of each sequence.
        pending: Tokens of each that wait for the last block already.

    Raises:
        UsageError: Another number of sequences, or a count that its sequence can't have.
    """
    checked = listed("counts", counts, lambda each: whole_number("a count", each))
    if len(checked) != len(new):
        raise UsageError(
            f"got counts for {len(checked)} sequences, the session has {len(new)}",
            hint="give one for each sequence",
        )
    for row, (count, ids) in enumerate(zip(checked, new, strict=True)):
        waiting = pending[row] + len(ids)
        if not min(len(ids), 1) <= count <= waiting:
            raise UsageError(
                f"asked for the logits of {count} tokens of sequence {row}, of which "
                f"{waiting} wait for the last block"
            )
    return checked


def _listed(token_ids: TokenIds) -> list[list[int]]:
    """Plain lists of the one sequence's tokens, or of each one's."""
    if type(token_ids) is list and token_ids:
        if all(type(ids) is list for ids in token_ids):
            return [_numbers(ids) for ids in token_ids]
        if all(type(token) is int for token in token_ids):
            return [token_ids.copy()]
    values: list[Any] = listed("token ids", token_ids, lambda each: each)
    if not values or any(map(is_whole, values)):
        return [_numbers(values)]
    return [_numbers(each) for each in values]


def _numbers(values: Any) -> list[int]:
    if type(values) is list and all(type(value) is int for value in values):
        return values.copy()
    return listed("token ids", values, lambda each: whole_number("a token id", each))
