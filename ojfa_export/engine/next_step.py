"""One step of a request: what its decoding needs next from the model, and what comes of it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import ExitCheck
from ojfa_export.decoding.sampling import GREEDY, Sampling


class NextStep(NamedTuple):
    """All tokens of the request's sequence shall run to a depth.

    Attributes:
        depth: Blocks to run; 0 for the draft layer, which has run all tokens but the newest.
        rows: About how many of the newest tokens the head is asked; no more than have not run so
            deep.
        sampling: How the next token is chosen, where that is one: `GREEDY` or `sampled_by`.
        draw: A number from [0, 1) for that, where it is sampled.
        logits: Whether the output must have logits: tokens and confidence are always there, and on
            a device they are all that comes to the host.
        check: Where the output decides if the same token runs deeper: how sure it must be.
        drafts: At depth 0, how many are wanted, the likeliest one after the other; others than one
            are given where there is a short way for them.
    """

    depth: int
    rows: int = 1
    sampling: Sampling = GREEDY
    draw: float = 0.0
    logits: bool = False
    check: ExitCheck | None = None
    drafts: int = 1


class Heads(Protocol):
    """What a head said about the tokens of several requests; see `engine.heads.Heads`."""

    def likeliest(self) -> list[int]:
        """The tokens of the largest logits."""
        ...

    def confidence(self, measure: Measure) -> list[float]:
        """How confident the head is of each."""
        ...

    def token(self, row: int, sampling: Sampling, draw: float) -> int:
        """The token that a request chooses."""
        ...

    def logits(self, row: int, rows: int) -> Float32:
        """Logits [rows, V] of a request that asked for them, from its first row on."""
        ...

    def drafts(self, row: int) -> list[int]:
        """What a draft layer drafts for a request: one token, or several that are its last."""
        ...


class StepOutput(NamedTuple):
    """What the head said about one request's tokens.

    Attributes:
        heads: About those of all requests that ran together.
        row: The first of them that is the request's.
        step: What it asked.
    """

    heads: Heads
    row: int
    step: NextStep

    @property
    def token(self) -> int:
        """The next token, as the step has it."""
        return self.heads.token(self.row, self.step.sampling, self.step.draw)

    @property
    def likeliest(self) -> list[int]:
        """The tokens of the largest logits, [rows]."""
        return self.heads.likeliest()[self.row : self.row + self.step.rows]

    @property
    def drafts(self) -> list[int]:
        """Drafts of the request: one, or several after which none follow."""
        return self.heads.drafts(self.row)

    def confidence(self, measure: Measure) -> float:
        """How confident the head is of the first."""
        return self.heads.confidence(measure)[self.row]

    @property
    def logits(self) -> Float32:
        """Logits [rows, V], where they were asked for."""
        return self.heads.logits(self.row, self.step.rows)
