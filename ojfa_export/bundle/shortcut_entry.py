"""What the manifest says of the bundle's shortcut."""

from __future__ import annotations

from pydantic import model_validator

from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.part import Part, PositiveInt
from ojfa_export.bundle.shortcut_file import ExitShortcut


class ShortcutEntry(Part):
    """The one jump.

    Attributes:
        kind: "ojfa", "residual" or "mlp".
        rank: Of a low-rank jump.
        fitted_at: Of a low-rank jump: blocks run before what it was fitted on.
        residual: Whether the jump is added to its input; the exit head then has an input
            `blocks_run`.
        gates: Of a residual jump of low rank, for exits 1..L-1; 0 is the identity.
        width: Of an MLP: features between its matrices.
    """

    kind: str
    rank: PositiveInt | None = None
    fitted_at: PositiveInt | None = None
    residual: bool
    parameters: PositiveInt
    gates: tuple[float, ...] | None = None
    width: PositiveInt | None = None

    @property
    def low_rank(self) -> int:
        """The rank, of a jump that has one."""
        assert self.rank is not None
        return self.rank

    @model_validator(mode="after")
    def _of_one_kind(self) -> ShortcutEntry:
        is_mlp = self.kind == "mlp"
        if (self.width is not None) != is_mlp or (is_mlp and not self.residual):
            raise ValueError("an MLP, and no other shortcut, has a width and is added to its input")
        for name in ("rank", "fitted_at"):
            if (getattr(self, name) is None) != is_mlp:
                raise ValueError(f"every shortcut but an MLP has {name}")
        if is_mlp and self.gates is not None:
            raise ValueError("an MLP has no gates")
        return self

    @classmethod
    def of(cls, shortcut: ExitShortcut) -> ShortcutEntry:
        """The entry of a shortcut."""
        kind, parameters = shortcut.kind, shortcut.parameters
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
