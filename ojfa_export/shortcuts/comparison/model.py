"""What a comparison of shortcuts holds."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from ojfa_export.shortcuts.kinds import Kind
from ojfa_export.shortcuts.metrics import ExitQuality


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadCost(_Strict):
    """What the check of one exit costs, one token at a time.

    Attributes:
        name: Which of the heads: kinds of one form share it.
        weights_read: Numbers; of a block behind an exit, keys and values of 128 tokens among them.
        bytes_read: The same as they are stored.
        milliseconds: Median on this machine, through ONNX Runtime.
        samples_ms: All of them.
    """

    name: str
    weights_read: int
    bytes_read: int
    milliseconds: float
    samples_ms: list[float]


class KindResult(_Strict):
    """One kind of shortcut.

    Attributes:
        kind: See `shortcuts.kinds`; None of one that was given.
        title: In words; of one that was given, its kind and its file.
        parameters: Stored, for all exits together.
        bytes: The same in fp32.
        fitted_at: Level of a jump that was fitted at one, else None.
        fit_seconds: What fitting took, processor time of all threads.
        check: What one exit costs.
        served: Exits of a block jump; None where it serves all.
        exits: For exits 1..L-1, or those that it serves.
    """

    kind: Kind | None
    title: str
    parameters: int
    bytes: int
    fitted_at: int | None
    fit_seconds: float
    check: HeadCost
    served: tuple[int, ...] | None = None
    exits: list[ExitQuality]

    def at(self, exit: int) -> ExitQuality | None:
        """Its figures at an exit; None where it doesn't serve that."""
        if self.served is None:
            return self.exits[exit - 1]
        return self.exits[self.served.index(exit)] if exit in self.served else None

    def mean(self, measure: str) -> float:
        """A measure of `ExitQuality`, the mean over exits."""
        values: list[float] = [getattr(each, measure) for each in self.exits]
        return sum(values) / len(values)


class Descent(_Strict):
    """One level's narrow jump, in closed form and by gradient descent.

    The loss is ||y - jump(h)||^2 summed over H, its mean over the rows that were fitted; seconds
    are processor time of all threads.
    """

    level: int
    closed_loss: float
    closed_seconds: float
    descent_loss: float
    descent_seconds: float


class Distillation(_Strict):
    """How the residual jump was distilled: see `shortcuts.distil.Distilled`."""

    steps: int
    loss_before: float
    loss_after: float
    gates: list[float]
    closed: list[int]


class Claim(_Strict):
    """A claim, and what the figures here say of it.

    Attributes:
        source: Whose.
        holds: None where this model can't decide it.
    """

    source: str
    statement: str
    holds: bool | None
    evidence: str


class Comparison(_Strict):
    """All kinds of shortcut on one model.

    Attributes:
        precision_at_1: [L-1][L-1] of narrow jumps, indexed [fitted_at - 1][used_at - 1].
        surprisal: The same, nats.
        tokens_measured: Held-out tokens behind the figures of an exit.
        machine: See `planning.machine`.
    """

    model: str
    model_sha256: str
    blocks: int
    hidden_size: int
    vocab_size: int
    rank: int
    calibration_sources: list[str]
    tokens_fitted: int
    tokens_measured: int
    kinds: list[KindResult]
    precision_at_1: list[list[float]]
    surprisal: list[list[float]]
    descent: list[Descent]
    distillation: Distillation
    claims: list[Claim]
    machine: dict[str, Any]

    @property
    def given(self) -> list[KindResult]:
        """Those that were given."""
        return [each for each in self.kinds if each.kind is None]

    def of(self, kind: Kind) -> KindResult:
        """The result of a kind."""
        return next(each for each in self.kinds if each.kind == kind)
