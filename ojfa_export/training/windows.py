"""Windows of token ids to train on, cut from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CalibrationError
from ojfa_export.models.calibration_text import CalibrationText
from ojfa_export.models.tokenizer import encode_all
from ojfa_export.training.sizes import HELD_OUT_SHARE, HELD_OUT_WINDOWS

if TYPE_CHECKING:
    from ojfa_export.writing.self_text import Written

# Fewer than these say nothing of how a jump does on text that it was not trained on.
LEAST_WINDOWS = 2 * HELD_OUT_SHARE
# Encoded together, and of each token, which has fewer in any language.
DOCUMENTS_AT_ONCE, CHARACTERS = 1024, 64


@dataclass(frozen=True)
class TrainingText:
    """The text of a training.

    Attributes:
        windows: [n, T] int32 token ids.
        parts: How many of them are of each source, in order; n in all.
        given: First tokens of each window that don't count, as they are alike in many.
        about: What the text is, for people.
    """

    windows: Int32
    parts: tuple[int, ...]
    given: int
    about: str

    @classmethod
    def of(cls, written: Written) -> TrainingText:
        """Text that the model wrote."""
        return cls(written.windows, written.parts, written.given, written.about)

    def held_out(self) -> tuple[Int32, Int32]:
        """Which windows to train on, and which to measure on: some from the end of each source.

        Single windows between those that are trained on would have their neighbours' words, and
        flatter the jump (by four points of agreement, demo checkpoint).
        """
        count = len(self.windows)
        aside = min(count // HELD_OUT_SHARE, HELD_OUT_WINDOWS)
        ends = np.cumsum(self.parts)
        shares = np.diff(aside * ends // count, prepend=0)
        held_out = np.concatenate(
            [np.arange(end - share, end) for end, share in zip(ends, shares, strict=True)]
        ).astype(np.int32)
        return np.setdiff1d(np.arange(count, dtype=np.int32), held_out), held_out


def token_ids(texts: Sequence[CalibrationText], tokenizer: Tokenizer, tokens: int) -> list[Int32]:
    """The token ids of each source, its documents one after the other.

    Args:
        texts: The sources.
        tokenizer: The model's.
        tokens: Of each source no more documents are read than give so many.
    """
    return [_ids(text.documents, tokenizer, tokens) for text in texts]


def _ids(documents: Sequence[str], tokenizer: Tokenizer, tokens: int) -> Int32:
    parts: list[Int32] = []
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = [
            each[: CHARACTERS * tokens] for each in documents[start : start + DOCUMENTS_AT_ONCE]
        ]
        parts += [np.array(ids, np.int32) for ids in encode_all(tokenizer, some)]
        if sum(map(len, parts)) >= tokens:
            break
    return np.concatenate(parts)


def cut(names: Sequence[str], sources: Sequence[Int32], length: int, tokens: int) -> TrainingText:
    """Cuts sources into windows: as many tokens as asked for, as evenly from all as they allow.

    Args:
        names: Of the sources.
        sources: Their token ids.
        length: Tokens of a window.
        tokens: Asked for; all there are, where they are fewer.

    Raises:
        CalibrationError: Fewer windows than training needs.
    """
    available = [len(each) // length for each in sources]
    wanted, taken = -(-tokens // length), [0] * len(sources)
    for done, index in enumerate(np.argsort(available, kind="stable").tolist()):  # the least first
        share = -(-(wanted - sum(taken)) // (len(sources) - done))
        taken[index] = min(available[index], share)
    check_enough(sum(taken), length, tokens, sum(available))
    parts = [
        each[: count * length].reshape(-1, length)
        for each, count in zip(sources, taken, strict=True)
    ]
    windows = np.concatenate(parts)
    about = f"{windows.size:,} tokens of {', '.join(names)}"
    if windows.size < tokens - length:
        about += f", all there are of {tokens:,} asked for"
    return TrainingText(windows, tuple(taken), 0, about)


def check_enough(windows: int, length: int, tokens: int, available: int | None = None) -> None:
    """Refuses too little text.

    Args:
        windows: Taken.
        length: Tokens of each.
        tokens: Asked for.
        available: Windows that there are.

    Raises:
        CalibrationError: Too few windows.
    """
    if windows >= LEAST_WINDOWS:
        return
    least = LEAST_WINDOWS * length
    if available is None or available >= LEAST_WINDOWS:
        raise CalibrationError(
            f"{tokens} tokens are too few to train on: {LEAST_WINDOWS} windows of {length} are "
            "the least",
            hint=f"use --tokens {least} or more; millions are better",
        )
    raise CalibrationError(
        f"the text has {available * length} tokens in whole windows of {length}, and training "
        f"needs {least}",
        hint="give more --text, or let the model write it with --self-text",
    )
