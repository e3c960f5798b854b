"""What a calibration report holds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ojfa_export.bundle.promise import Promise
from ojfa_export.shortcuts.metrics import ExitQuality
from ojfa_export.verify.change import Change
from ojfa_export.verify.check import Check

Share = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExitReport(_Strict):
    """Quality of the shortcuts at one exit, on held-out tokens.

    Attributes:
        blocks: Blocks run before the exit.
        ojfa: The one jump that serves every exit.
        multi_jump: A jump of the same rank for each exit (N-NJTC).
        identity: No jump: the hidden state read as if it were the last one.
        residual: The shared residual jump, where it was fitted.
        given: The shortcut that the build was given; then no other was fitted.
    """

    blocks: int = Field(ge=1)
    ojfa: ExitQuality | None = None
    multi_jump: ExitQuality | None = None
    identity: ExitQuality
    residual: ExitQuality | None = None
    given: ExitQuality | None = None


class LatencyRow(_Strict):
    """Decode latency of one exit in milliseconds per token; `blocks` equal to L is full depth."""

    blocks: int = Field(ge=1)
    decode_ms_median: float = Field(gt=0)
    decode_ms_p95: float = Field(gt=0)


class CalibrationReport(_Strict):
    """How the shortcut was fitted and chosen, or that it was given, and how good it is.

    Attributes:
        model: The model's name.
        blocks: L, the number of blocks.
        hidden_size: H.
        rank: r of every jump; None of an MLP or a block.
        width: Of an MLP.
        exit_blocks: Of a block jump: one for all exits, or one for each. Left out of JSON else.
        kind: Of the shortcut in the bundle.
        fitted_at: Blocks run before the hidden states that the one narrow jump was fitted on; None
            of an MLP or a block.
        reason: Why that level and that kind, in words.
        parameters: Weights of the shortcut in the bundle.
        parameters_multi_jump: Weights of a jump for every exit, where those were fitted.
        calibration_sources: Where the calibration text comes from.
        tokens_fitted: Tokens that the jumps were fitted on; 0 where the shortcut was given.
        tokens_held_out: Tokens that the qualities were measured on.
        exits: For exits 1..L-1, in order; of a block jump for those that it serves.
        precision_at_1: [L-1][L-1], indexed [fitted_at - 1][used_at - 1]; empty where the shortcut
            was given.
        surprisal: The same for the mean surprisal, in nats.
        checks: The verification's, once it has run.
        latency: The benchmark's, once it has run.
        promise: What was asked and shown of `--exit auto`, if anything.
        weights: What matrices are quantised to, in words; None where none is. Left out of JSON.
        change: What quantising changed, once it was measured. Left out as well.
        check: Of a check head: how many tokens, and why. Left out as well.

    Raises:
        ValidationError: Unknown fields, or a number of exits or a matrix that does not fit L.
    """

    model: str
    blocks: int = Field(ge=2)
    hidden_size: int = Field(ge=1)
    rank: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    exit_blocks: int | None = Field(default=None, ge=1)
    kind: str
    fitted_at: int | None = Field(default=None, ge=1)
    reason: str
    parameters: int = Field(ge=1)
    parameters_multi_jump: int | None = Field(default=None, ge=1)
    calibration_sources: list[str]
    tokens_fitted: int = Field(default=0, ge=0)
    tokens_held_out: int = Field(ge=1)
    exits: list[ExitReport]
    precision_at_1: list[list[Share]] = []
    surprisal: list[list[Nats]] = []
    checks: list[Check] = []
    latency: list[LatencyRow] = []
    promise: Promise | None = None
    weights: str | None = None
    change: Change | None = None
    check: str | None = None

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what says nothing: reports of other bundles are as they were."""
        fields: dict[str, Any] = serialize(self)
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name not in ("weights", "change", "check", "exit_blocks")
        }

    @property
    def measured(self) -> list[str]:
        """The fields of `ExitReport` that have figures."""
        return [name for name, each in self.exits[0] if isinstance(each, ExitQuality)]

    @property
    def agreement(self) -> list[float]:
        """Share of held-out tokens at which exits 1..L-1 choose the full model's token."""
        name = "given" if self.exits[0].given else self.kind
        return [getattr(row, name).precision_at_1 for row in self.exits]

    @property
    def worth(self) -> str:
        """What the exits are worth, in words."""
        exits = [row.blocks for row in self.exits]
        middle = min(range(len(exits)), key=lambda index: abs(exits[index] - self.blocks // 2))
        picked = sorted({0, middle, len(exits) - 1})
        shares = [f"{self.agreement[index]:.0%} after {exits[index]}" for index in picked]
        return f"full depth's token for {', '.join(shares)} of {self.blocks} blocks"

    @property
    def shortcut(self) -> str:
        """The shortcut in the bundle, in words."""
        if self.kind == "mlp":
            return f"one MLP of {self.width} features for all exits"
        if self.exit_blocks is not None:
            exits = ", ".join(str(row.blocks) for row in self.exits)
            return f"{self._blocks_behind} exits {exits}"
        if self.kind == "residual":
            return f"shared residual shortcut of rank {self.rank}"
        return f"shortcut of rank {self.rank} fitted after block {self.fitted_at}"

    @property
    def _blocks_behind(self) -> str:
        one = self.exit_blocks == 1
        return "one block behind" if one else f"{self.exit_blocks} blocks behind"

    @model_validator(mode="after")
    def _levels_agree(self) -> CalibrationReport:
        levels = self.blocks - 1
        exits = [row.blocks for row in self.exits]
        if self.exit_blocks is None and exits != list(range(1, self.blocks)):
            raise ValueError(f"exits are not 1..{levels}")
        if not exits or exits != sorted(set(exits)) or exits[-1] > levels:
            raise ValueError(f"exits {exits} don't rise within 1..{levels}")
        if self.fitted_at is not None and self.fitted_at > levels:
            raise ValueError(f"fitted_at {self.fitted_at} is outside 1..{levels}")
        expected = 0 if self.exits[0].given else levels
        for name in ("precision_at_1", "surprisal"):
            matrix: list[list[float]] = getattr(self, name)
            if len(matrix) != expected or any(len(row) != levels for row in matrix):
                raise ValueError(f"{name} is not {levels} x {levels}")
        return self
