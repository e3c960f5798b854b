"""Drafts that the device has before the host: what a chain of a draft layer gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ojfa_export.decoding.head_output import HeadOutput


@dataclass(frozen=True, eq=False)
class DeviceDrafts:
    """Drafts on their way to the host; see `backends.draft.Drafts`.

    Attributes:
        pointer: Address of the tokens [rows, 1 + drafts] int32, as `tokens` gives them.
        first: The token of each row that the drafts follow.
        outputs: What the layer's head said, draft by draft.
    """

    pointer: int
    first: Sequence[int]
    outputs: Sequence[HeadOutput]

    @property
    def count(self) -> int:
        """See `backends.draft.Drafts`."""
        return len(self.outputs)

    def drafts(self) -> list[list[int]]:
        """See `backends.draft.Drafts`."""
        return [list(row) for row in zip(*(each.likeliest() for each in self.outputs), strict=True)]

    def tokens(self) -> list[int]:
        """See `backends.draft.Drafts`."""
        both = zip(self.first, self.drafts(), strict=True)
        return [token for first, drafts in both for token in (first, *drafts)]
