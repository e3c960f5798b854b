"""What the manifest says of the bundle's shortcut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.part import Part, PositiveInt
from ojfa_export.bundle.shortcut_file import ExitShortcut


class ShortcutEntry(Part):
    """The one jump.

    Attributes:
        kind: "ojfa", "residual", "mlp" or "block".
        rank: Of a low-rank jump.
        fitted_at: Of a low-rank jump: blocks run before what it was fitted on.
        residual: Whether the jump is added to its input; the exit head then has an input
            `blocks_run`.
        gates: Of a residual jump of low rank, for exits 1..L-1; 0 is the identity.
        width: Of an MLP: features between its matrices.
        exits: Of a block jump, the only exits that there are; rising. Left out of another's entry.
        blocks: Of a block jump: one for all of its exits, or one for each. Left out as well.
    """

    kind: str
    rank: PositiveInt | None = None
    fitted_at: PositiveInt | None = None
    residual: bool
    parameters: PositiveInt
    gates: tuple[float, ...] | None = None
    width: PositiveInt | None = None
    exits: tuple[PositiveInt, ...] | None = None
    blocks: PositiveInt | None = None

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What reads bundles of an earlier form knows no such fields."""
        fields: dict[str, Any] = serialize(self)
        later = ("exits", "blocks")
        return {k: each for k, each in fields.items() if each is not None or k not in later}

    @property
    def low_rank(self) -> int:
        """The rank, of a jump that has one."""
        assert self.rank is not None
        return self.rank

    @model_validator(mode="after")
    def _of_one_kind(self) -> ShortcutEntry:
        if self._is_block():
            return self
        is_mlp = self.kind == "mlp"
        if (self.width is not None) != is_mlp or (is_mlp and not self.residual):
            raise ValueError("an MLP, and no other shortcut, has a width and is added to its input")
        for name in ("rank", "fitted_at"):
            if (getattr(self, name) is None) != is_mlp:
                raise ValueError(f"every shortcut but an MLP has {name}")
        if is_mlp and self.gates is not None:
            raise ValueError("an MLP has no gates")
        return self

    def _is_block(self) -> bool:
        """Whether it is a block jump, whose fields fit together.

        Raises:
            ValueError: They don't.
        """
        is_block, exits = self.kind == "block", self.exits or ()
        if (self.exits is not None) != is_block or (self.blocks is not None) != is_block:
            raise ValueError("a block jump, and no other shortcut, has exits and blocks")
        if not is_block:
            return False
        others = (self.rank, self.fitted_at, self.gates, self.width)
        if self.residual or any(each is not None for each in others):
            raise ValueError("a block jump has exits and blocks alone")
        if not exits or any(a >= b for a, b in pairwise(exits)):
            raise ValueError("the exits of a block jump must rise")
        if self.blocks not in (1, len(exits)):
            raise ValueError("a block jump has one block, or one for each exit")
        return True

    @classmethod
    def of(cls, shortcut: ExitShortcut) -> ShortcutEntry:
        """The entry of a shortcut."""
        kind, parameters = shortcut.kind, shortcut.parameters
        if isinstance(shortcut, BlockShortcut):
            return cls(
                kind=kind,
                parameters=parameters,
                residual=False,
                exits=shortcut.exits,
                blocks=shortcut.blocks,
            )
        if isinstance(shortcut, MlpShortcut):
            return cls(kind=kind, parameters=parameters, residual=True, width=shortcut.width)
        return cls(
            kind=kind,
            parameters=parameters,
            rank=shortcut.rank,
            fitted_at=shortcut.fitted_at,
            residual=shortcut.residual,
            gates=None if shortcut.gates is None else tuple(shortcut.gates.tolist()),
        )
