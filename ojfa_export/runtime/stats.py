"""What a session counts of its work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields


@dataclass
class Stats:
    """Counts since a session began; its owner may set them back.

    Attributes:
        exits: Steps of one sequence by blocks run (of the newest token).
        exit_heads: Rows that the exit head was applied to; not those that a check head alone was.
        final_heads: Rows that the model's own head was applied to.
        checks: Rows whose confidence an exit policy's threshold was compared with.
        drafted: Tokens that speculation proposed.
        accepted: Those of them that the full model took.
        rounds: Full passes that checked drafts; each gives one token beside the accepted.
        stopped: Tokens that a policy stopped before the last block, by blocks run.
        confidence_sums: Their confidence, summed, by blocks run.
        shadow_checks: Early tokens that were completed and compared with the full model.
        shadow_disagreements: Those of them that differ from it.
    """

    exits: Counter[int] = field(default_factory=Counter)
    exit_heads: int = 0
    final_heads: int = 0
    checks: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    stopped: Counter[int] = field(default_factory=Counter)
    confidence_sums: dict[int, float] = field(default_factory=dict)
    shadow_checks: int = 0
    shadow_disagreements: int = 0

    def add(self, other: Stats) -> None:
        """Adds what another session counted."""
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, int):
                setattr(self, each.name, mine + more)
            else:
                for depth, count in more.items():
                    mine[depth] = mine.get(depth, 0) + count

    def count_head(self, rows: int, *, final: bool) -> None:
        """Counts rows that a head was applied to: the model's own, or the exit head."""
        if final:
            self.final_heads += rows
        else:
            self.exit_heads += rows

    def count_stopped(self, depth: int, count: int, confidence: float) -> None:
        """Counts tokens that a policy stopped after `depth` blocks, and their summed confidence."""
        self.stopped[depth] += count
        self.confidence_sums[depth] = self.confidence_sums.get(depth, 0.0) + confidence

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

    @property
    def mean_confidence(self) -> dict[int, float]:
        """Mean confidence of the tokens that a policy stopped at each exit, by blocks run."""
        sums = self.confidence_sums
        return {depth: sums[depth] / count for depth, count in sorted(self.stopped.items())}
