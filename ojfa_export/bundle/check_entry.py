"""What the manifest says of a check head: a small head that exit policies ask."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ojfa_export.bundle.entries import EngineSet, GraphEntry, TensorSlice
from ojfa_export.bundle.part import NonNegativeInt, Part, PositiveInt
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.spec import ModelSpec


class DecidedGolden(Part):
    """Greedy tokens of a policy that these engines must reproduce on any machine.

    Attributes:
        blocks_run: Blocks that each token ran.
    """

    policy: ExitPolicy
    prompt_token_ids: tuple[NonNegativeInt, ...] = Field(min_length=1)
    token_ids: tuple[NonNegativeInt, ...] = Field(min_length=1)
    blocks_run: tuple[PositiveInt, ...] = Field(min_length=1)


class CheckEntry(Part):
    """The exit head over some tokens alone, whose confidence policies compare with thresholds.

    The token of one that leaves is the whole exit head's.

    Attributes:
        tokens: Ids [n] int32 that its logits are of, rising.
        reason: Why so many, in words.
        graphs: `names.CHECK_HEAD`.
        engines: Of the backends that run it.
        golden: Of a policy; None where no token leads clearly.
    """

    tokens: TensorSlice
    reason: str
    graphs: tuple[GraphEntry, ...]
    engines: tuple[EngineSet, ...]
    golden: DecidedGolden | None = None

    @property
    def size(self) -> int:
        """Tokens that its logits are of, n."""
        return self.tokens.shape[0]

    def check_fits(
        self, model: ModelSpec, max_length: int, served: Sequence[int] | None = None
    ) -> None:
        """Refuses a head of another model.

        Args:
            model: The bundle's.
            max_length: Tokens of its cache.
            served: The exits before the last block that there are; None for all.

        Raises:
            ValueError: What doesn't fit.
        """
        if len(self.tokens.shape) != 1 or self.size > model.vocab_size:
            raise ValueError("check.tokens: they must be some of the model's")
        golden = self.golden
        if golden is None:
            return
        golden.policy.check_fits(model.blocks, served)
        ids = (*golden.prompt_token_ids, *golden.token_ids)
        depths = {*golden.policy.exits, model.blocks}
        fits = max(ids) < model.vocab_size and len(ids) <= max_length + 1
        same = len(golden.token_ids) == len(golden.blocks_run)
        if not (fits and same and depths.issuperset(golden.blocks_run)):
            raise ValueError("check.golden: its tokens are outside the model")
