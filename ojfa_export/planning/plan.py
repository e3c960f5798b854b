"""The planner: times a bundle here and now, and joins that with what its exits say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ojfa_export import backends
from ojfa_export.bundle.names import STATISTICS
from ojfa_export.bundle.promise import DEFAULT_CONFIDENCE
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.planning.drafting import measure_layer
from ojfa_export.planning.frontier import (
    Point,
    fixed_exits,
    layer_speculation,
    policies,
    policy_point,
    speculation,
)
from ojfa_export.planning.machine import describe_machine
from ojfa_export.planning.recommend import advice, choose_default
from ojfa_export.planning.rehearse import ROOM, rehearse
from ojfa_export.planning.step_costs import StepCosts, measure_costs
from ojfa_export.planning.turns import Turns
from ojfa_export.promises.statistics import ExitStatistics, load_statistics, split_with
from ojfa_export.runtime.model import load
from ojfa_export.system.progress import SILENT, Progress

# Turns of timing, and when to stop beginning them: of costs, and of rehearsals.
ROUNDS, SECONDS = 16, 30.0


@dataclass(frozen=True)
class Plan:
    """What `ojfa-export plan` says.

    Attributes:
        machine: See `planning.machine`.
        costs: Of steps, measured.
        points: The frontier.
        own: The bundle's policy, where it has one.
        default: What the bundle should do here where its user names no way.
        advice: In plain words, the verdict first.
        windows: Pieces of text behind the agreements of fixed exits and of drafts.
        tokens: Looked at in them; behind those of exits per token, `Point.tokens`.
    """

    machine: dict[str, Any]
    costs: StepCosts
    points: list[Point]
    own: Point | None
    default: Default
    advice: list[str]
    windows: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return {
            "machine": self.machine,
            "costs_ms": self.costs.model_dump(),
            "frontier": [_as_json(point) for point in self.points],
            "bundle_policy": self.own and _as_json(self.own),
            "default": self.default.model_dump(mode="json"),
            "advice": self.advice,
            "windows": self.windows,
            "tokens": self.tokens,
        }


def _as_json(point: Point) -> dict[str, Any]:
    policy = point.policy and point.policy.model_dump(mode="json")
    return {"name": point.name, **asdict(point), "policy": policy}


def plan_bundle(
    bundle: Path,
    progress: Progress = SILENT,
    confidence: float = DEFAULT_CONFIDENCE,
    backend: str = backends.DEFAULT,
) -> Plan:
    """Plans for a bundle on this machine.

    Args:
        bundle: Its directory.
        progress: Shows what is under way.
        confidence: With which a policy must be shown to keep its limit to count as certified.
        backend: Which of its engines to run.

    Raises:
        BundleError: It can't be opened, or has no statistics of its exits.
    """
    model = load(bundle, backend=backend)
    splits = load_statistics(bundle / STATISTICS)
    manifest = model.manifest
    length = manifest.cache.max_length
    costs = measure_costs(
        model.spec, model.engines, length, rounds=ROUNDS, seconds=SECONDS, progress=progress
    )
    if model.drafts is not None and manifest.draft is not None and manifest.draft.acceptance:
        drafting = measure_layer(
            model.spec, model.engines, model.drafts, manifest.draft.acceptance, length,
            ROUNDS, SECONDS, progress,
        )  # fmt: skip
        costs = costs.model_copy(update={"drafting": drafting})
    policy = manifest.auto if manifest.promise is not None else None
    turns = Turns(model.spec, model.engines, length, ROOM)
    machine = describe_machine(backend=backends.load(backend))
    return make_plan(splits, costs, policy, confidence, progress, turns, machine)


def make_plan(
    splits: Mapping[str, ExitStatistics],
    costs: StepCosts,
    policy: ExitPolicy | None,
    confidence: float,
    progress: Progress = SILENT,
    turns: Turns | None = None,
    machine: dict[str, Any] | None = None,
) -> Plan:
    """The plan that follows from statistics and costs.

    Args:
        splits: Of the statistics.
        costs: Of steps.
        policy: That keeps the bundle's promise, if it has one.
        confidence: Of certification.
        progress: Shows what is under way.
        turns: Where to rehearse; without it, times are what the costs add up to.
        machine: That the costs were measured on; default: this one.
    """
    every = _of_every_exit(splits)
    points = basic_points(splits, costs) + policies(splits, costs, confidence, progress)
    own = own_point(splits, costs, policy)
    points, own = _rehearsed(points, own, splits, costs, turns, SECONDS, progress)
    return Plan(
        machine=describe_machine() if machine is None else machine,
        costs=costs,
        points=points,
        own=own,
        default=choose_default(points, own, splits, costs),
        advice=advice(points, own),
        windows=every.windows,
        tokens=every.tokens,
    )


def basic_points(splits: Mapping[str, ExitStatistics], costs: StepCosts) -> list[Point]:
    """Fixed exits, full depth and speculation, which no split chose."""
    every = _of_every_exit(splits)
    drafting = speculation(every, costs) + layer_speculation(every.blocks, costs)
    return fixed_exits(every, costs) + drafting


def _of_every_exit(splits: Mapping[str, ExitStatistics]) -> ExitStatistics:
    return split_with(splits, splits["tuning"].exits)


def own_point(
    splits: Mapping[str, ExitStatistics], costs: StepCosts, policy: ExitPolicy | None
) -> Point | None:
    """The bundle's policy; None where it has none, or one without exits."""
    if policy is None or not policy.exits:
        return None
    return policy_point(policy, split_with(splits, policy.exits), costs)


def plan_default(
    splits: Mapping[str, ExitStatistics],
    costs: StepCosts,
    policy: ExitPolicy | None,
    turns: Turns | None = None,
    seconds: float = SECONDS,
    progress: Progress = SILENT,
) -> Default:
    """What a bundle should do where its user names no way: a part of `make_plan`."""
    points, own = _rehearsed(
        basic_points(splits, costs), own_point(splits, costs, policy),
        splits, costs, turns, seconds, progress,
    )  # fmt: skip
    return choose_default(points, own, splits, costs)


def _rehearsed(
    points: list[Point],
    own: Point | None,
    splits: Mapping[str, ExitStatistics],
    costs: StepCosts,
    turns: Turns | None,
    seconds: float,
    progress: Progress,
) -> tuple[list[Point], Point | None]:
    if turns is None:
        return points, own
    expected = points if own is None else [*points, own]
    found = rehearse(expected, splits["tuning"], costs, turns, seconds, progress)
    return found[: len(points)], None if own is None else found[-1]
