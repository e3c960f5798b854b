"""Expected time and agreement of every way of decoding, from costs and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.promise import Limits, Promise
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.speculation import MAX_DRAFT, Speculation
from ojfa_export.planning.step_costs import StepCosts
from ojfa_export.promises.certify import certify
from ojfa_export.promises.choose import choose_path, most_eager
from ojfa_export.promises.outcomes import apply
from ojfa_export.promises.statistics import ExitStatistics, split_with
from ojfa_export.system.progress import Progress

# Shares of tokens that may differ, for which exits per token are planned.
DISAGREEMENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)

Kind = Literal["full", "fixed", "auto", "speculation"]


@dataclass(frozen=True)
class Point:
    """One way of decoding one sequence.

    Attributes:
        kind: "full" and "speculation" give the tokens of full depth.
        ms: Expected milliseconds per token.
        agreement: Share of tokens that are the full model's choice, given those before them.
        worst_agreement: In the domain where that is least.
        blocks: Run for a token, on average; of speculation, blocks of drafts and checks per token.
        exit: Of a fixed exit, or the one that drafts; 0 for the draft layer.
        draft: Tokens per draft.
        policy: Of exits per token.
        limit: Share of tokens that may differ, for which the policy was chosen.
        certified: Whether the statistics show, with the confidence asked, that the limit is kept.
        tokens: Looked at for the agreement of exits, in `windows` pieces of text.
        windows: See there.
    """

    kind: Kind
    ms: float
    agreement: float
    worst_agreement: float
    blocks: float
    exit: int | None = None
    draft: int | None = None
    policy: ExitPolicy | None = None
    limit: float | None = None
    certified: bool | None = None
    tokens: int | None = None
    windows: int | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        if self.kind == "auto":
            asked = "this bundle's" if self.limit is None else f"{self.limit:.3g} may differ"
            return f"auto, {asked}"
        if self.kind == "speculation":
            return f"speculation, {self.draft} from {self.drafts_from}"
        return "full" if self.kind == "full" else f"exit {self.exit}"

    @property
    def drafts_from(self) -> str:
        """Where drafts come from."""
        return f"exit {self.exit}" if self.exit else "the draft layer"


def fixed_exits(statistics: ExitStatistics, costs: StepCosts) -> list[Point]:
    """Every exit, and full depth."""
    by_window = statistics.agrees.mean(axis=1)
    points = [
        Point("fixed", costs.exits[exit - 1], *_overall(1 - by_window[:, column], statistics),
              blocks=exit, exit=exit)
        for column, exit in enumerate(statistics.exits)
    ]  # fmt: skip
    return [*points, Point("full", costs.full, 1.0, 1.0, statistics.blocks)]


def policy_point(
    policy: ExitPolicy,
    statistics: ExitStatistics,
    costs: StepCosts,
    limit: float | None = None,
    certified: bool | None = None,
) -> Point:
    """Exits per token by a policy, as it does on some statistics."""
    outcome = apply(statistics, policy, costs.of_policies(), surprisal_clip=1.0)
    return Point(
        "auto",
        float(outcome.cost.mean()),
        *_overall(outcome.disagreement, statistics),
        blocks=float(outcome.depth.mean()),
        policy=policy,
        limit=limit,
        certified=certified,
        tokens=statistics.tokens,
        windows=statistics.windows,
    )


def policies(
    splits: Mapping[str, ExitStatistics],
    costs: StepCosts,
    confidence: float,
    progress: Progress,
    disagreements: Sequence[float] = DISAGREEMENTS,
) -> list[Point]:
    """The cheapest policy for each share of tokens that may differ, where one saves time.

    It is certified where there is text enough, among the exits that the build looked at for that;
    else it is what the tuning split suggests.

    Args:
        splits: Of the statistics.
        costs: Of steps.
        confidence: Of certification.
        progress: Shows shares.
        disagreements: The shares.
    """
    tuning, certification = splits["tuning"], splits["certification"]
    points = []
    with progress.task("planning exits per token", len(disagreements), "promises") as task:
        for limit in disagreements:
            limits = Limits(max_disagreement=limit, confidence=confidence)
            promise: Promise = certify(tuning, certification, limits, costs.of_policies())
            policy = promise.policy or _suggested(tuning, limits, costs)
            if policy is not None:
                certified = promise.policy is not None
                seen = split_with(splits, policy.exits)
                points.append(policy_point(policy, seen, costs, limit, certified))
            task.advance()
    return points


def _suggested(tuning: ExitStatistics, limits: Limits, costs: StepCosts) -> ExitPolicy | None:
    path = choose_path(tuning, limits, costs.of_policies(), slack=0.0)
    if path is None:
        return None
    step = most_eager(path, tuning, limits, limits.shares(), costs.of_policies())
    return None if step is None else path.policy(step)


def speculation(statistics: ExitStatistics, costs: StepCosts) -> list[Point]:
    """Every exit that drafts, with every length up to MAX_DRAFT.

    A round drafts K tokens and checks them in a pass of the remaining blocks over K + 1. With a_j
    the share of places where an exit agrees j times running, it gives 1 + a_1 + ... + a_K tokens.
    """
    points = []
    for column, exit in enumerate(statistics.exits):
        tokens = 1 + np.cumsum(agreement_runs(statistics, column, MAX_DRAFT))
        for draft in range(1, MAX_DRAFT + 1):
            deep = statistics.blocks - exit
            ms = round_ms(costs, exit, draft) / tokens[draft - 1]
            blocks = (draft + 1) * (exit + deep) / tokens[draft - 1]
            points.append(
                Point("speculation", float(ms), 1.0, 1.0, float(blocks), exit=exit, draft=draft)
            )
    return points


def layer_speculation(blocks: int, costs: StepCosts) -> list[Point]:
    """The draft layer with every length up to MAX_DRAFT; none where there is none."""
    drafting, points = costs.drafting, []
    if drafting is None or not drafting.acceptance:
        return []
    for draft in range(1, MAX_DRAFT + 1):
        tokens = drafting.tokens(draft)
        ms, run = (drafting.round + draft * drafting.each) / tokens, (draft + 1) * blocks / tokens
        points.append(Point("speculation", ms, 1.0, 1.0, run, exit=0, draft=draft))
    return points


def round_ms(costs: StepCosts, exit: int, draft: int) -> float:
    """A round of speculation: K steps at the exit, and the pass that checks K + 1 tokens."""
    catching_up = costs.catching_up(len(costs.exits) - exit, draft)
    return draft * costs.exits[exit - 1] + costs.full + catching_up + draft * costs.final_row


def agreement_runs(statistics: ExitStatistics, column: int, longest: int) -> NDArray[np.float64]:
    """How often an exit agrees j times running, for j = 1 to `longest`.

    Counted in the statistics' runs of neighbours; beyond their length, each window's further
    tokens are taken to agree independently, as often as its others.

    Args:
        statistics: E exits.
        column: Which exit, from 0.
        longest: j at most.
    """
    agrees = statistics.agrees[..., column]
    runs = agrees.reshape(len(agrees), -1, statistics.run)
    shares: list[float] = []
    running = np.ones_like(runs)
    for length in range(1, min(longest, statistics.run) + 1):
        ends = statistics.run - length + 1
        running = running[..., :ends] & runs[..., length - 1 :]
        shares.append(float(running.mean()))
    whole, single = running.mean(axis=(1, 2)), agrees.mean(axis=1)
    for more in range(1, longest - len(shares) + 1):
        shares.append(float((whole * single**more).mean()))
    return np.array(shares)


def as_speculation(point: Point, statistics: ExitStatistics, costs: StepCosts) -> Speculation:
    """How to draft at a point's exit: the length adapts, from what is expected on.

    A draft layer's is the point's: of answers adapting made less in every measurement
    (docs/drafting.md), as it takes a while to see, and a device has a recording for each length.
    """
    if point.exit == 0:
        return _as_layer_speculation(point, costs)
    assert point.exit is not None
    deep, full = statistics.blocks - point.exit, costs.full
    return Speculation(
        exit=point.exit,
        draft_cost=costs.exits[point.exit - 1] / full,
        check_cost=(deep * costs.waiting + costs.final_row) / full,
        round_cost=costs.catching_up(deep, 0) / full,
        acceptance=float(statistics.agrees[..., statistics.exits.index(point.exit)].mean()),
    )


def _as_layer_speculation(point: Point, costs: StepCosts) -> Speculation:
    drafting = costs.drafting
    assert drafting is not None
    return Speculation(
        exit=0,
        draft=point.draft,
        draft_cost=drafting.each / costs.full,
        check_cost=0.0,  # a draft was timed with its check
        round_cost=max(0.0, drafting.round / costs.full - 1),
        acceptance=drafting.acceptance[0],
    )


def _overall(disagreement: NDArray[np.float64], statistics: ExitStatistics) -> tuple[float, float]:
    """Agreement over all windows, and in the worst domain."""
    worst = max(float(disagreement[rows].mean()) for rows in statistics.members())
    return 1 - float(disagreement.mean()), 1 - worst
