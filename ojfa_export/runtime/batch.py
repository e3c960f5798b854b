"""Token ids as callers give them: for one sequence, or a list for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ojfa_export.errors import UsageError
from ojfa_export.runtime.sequence import Sequence as TokenSequence

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
    nested = len(token_ids) > 0 and not isinstance(token_ids[0], (int, np.integer))
    new: list[Sequence[int]] = list(token_ids) if nested else [token_ids]  # type: ignore[arg-type, list-item]
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
    return [list(map(int, ids)) for ids in new]
