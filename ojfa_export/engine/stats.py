"""What the engine counts, for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine began, and what is going on now.

    Attributes:
        running: Requests that have a slot.
        waiting: Requests in the queue.
        pages_used: Of the KV cache; what is kept for later requests counts.
        pages: Of the KV cache.
        finished: Requests that ended, by finish reason; "error" are those that failed.
        prompt_tokens: Of requests that were begun.
        cached_tokens: Those of them that were found in the prefix cache.
        new_tokens: Generated.
        blocks_run: Generated tokens by the blocks that computed them.
        passes: Runs of the model on one or several requests.
        pass_tokens: Tokens that entered a pass's first block, or caught up in one, in sum.
        catch_up_tokens: Those of them that had left at an exit before, and ran deeper later.
        preemptions: Requests that went back to the queue, as pages ran out.
        drafted: Tokens that speculation drafted and that were given.
    """

    running: int
    waiting: int
    pages_used: int
    pages: int
    finished: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    blocks_run: dict[int, int]
    passes: int
    pass_tokens: int
    catch_up_tokens: int
    preemptions: int
    drafted: int

    @property
    def blocks_per_token(self) -> float:
        """Blocks that computed a generated token, on average."""
        count = sum(self.blocks_run.values())
        return sum(blocks * n for blocks, n in self.blocks_run.items()) / max(count, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass ran, on average."""
        return self.pass_tokens / max(self.passes, 1)


@dataclass
class Counts:
    """The counting part of `EngineStats`."""

    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    blocks_run: Counter[int] = field(default_factory=Counter)
    passes: int = 0
    pass_tokens: int = 0
    catch_up_tokens: int = 0
    preemptions: int = 0
    drafted: int = 0

    def clear(self) -> None:
        """Begins anew."""
        vars(self).update(vars(Counts()))
