"""What a session counts of its work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counts since a session began; its owner may set them back.

    Attributes:
        exits: Steps of one sequence by blocks run (of the newest token).
        exit_heads: Rows that the exit head was applied to.
        final_heads: Rows that the model's own head was applied to.
        checks: Those of `exit_heads` that an exit policy's threshold was compared with.
        drafted: Tokens that speculation proposed.
        accepted: Those of them that the full model took.
        rounds: Full passes that checked drafts; each gives one token beside the accepted.
    """

    exits: Counter[int] = field(default_factory=Counter)
    exit_heads: int = 0
    final_heads: int = 0
    checks: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def mean_blocks(self) -> float:
        """Blocks run for a step's newest token, on average; 0 before the first."""
        steps = sum(self.exits.values())
        return sum(blocks * count for blocks, count in self.exits.items()) / max(steps, 1)

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; 0 before the first."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_full_pass(self) -> float:
        """Tokens that a full pass of speculation gives, on average; 0 before the first."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else 0.0
