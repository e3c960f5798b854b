"""What a log's requests did, beside what the calibration text did."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from ojfa_export.bundle.promise import Limits
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.promises.drift.compare import (
    Distance,
    Float64,
    common_grid,
    cumulative,
    exit_shares,
    largest,
    permutation_test,
    total_variation,
)
from ojfa_export.promises.drift.replay import Replayed, Watched, by_domain
from ojfa_export.promises.drift.unit import Unit, calibration_units

# Points of the running estimate that are kept for a picture.
COURSE = 200
SEED = 0


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comparison(_Part):
    """A distance between calibration and log; see `compare.Distance`.

    Attributes:
        drifted: Whether luck alone makes it so large so rarely that, over all comparisons of the
            report together, it would with probability `false_alarms` at most.
    """

    distance: float
    p_value: float
    drifted: bool


class ExitsTaken(_Part):
    """Shares of tokens, means over units.

    Attributes:
        blocks: Blocks run: the policy's exits, and full depth.
        calibration: For each of them.
        log: For each of them.
        comparison: By total variation.
    """

    blocks: tuple[int, ...]
    calibration: tuple[float, ...]
    log: tuple[float, ...]
    comparison: Comparison


class ConfidenceAt(_Part):
    """Confidence at one exit, of the tokens that it was asked about.

    Attributes:
        blocks: The exit.
        threshold: The policy's.
        grid: Confidences.
        calibration: Share of tokens at or below each, mean over units.
        log: The same.
        comparison: By the largest difference of the two; None where a side has no token here.
    """

    blocks: int
    threshold: float
    grid: tuple[float, ...]
    calibration: tuple[float, ...]
    log: tuple[float, ...]
    comparison: Comparison | None


class Course(_Part):
    """The running estimate after so many units of the domain."""

    units: tuple[int, ...]
    estimate: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]


class Disagreement(_Part):
    """Share of tokens that differ from the full model's choice.

    Attributes:
        limit: What was promised.
        calibration: Mean over windows.
        units: Requests of which tokens were compared.
        estimate: Their mean; None where nothing was.
        lower: Of an interval that holds at every moment; see `runtime.disagreement.State`.
        upper: The other end.
        alarm: Whether the promise was seen to be broken.
        alarm_at: After so many units.
        course: How they came about.
    """

    limit: float
    calibration: float
    units: int
    estimate: float | None
    lower: float
    upper: float
    alarm: bool
    alarm_at: int | None
    course: Course


class DomainDrift(_Part):
    """One domain's requests beside its windows; a domain None beside the windows of all."""

    domain: str | None
    requests: int
    tokens: int
    calibration_windows: int
    exits: ExitsTaken
    confidence: tuple[ConfidenceAt, ...]
    disagreement: Disagreement


class DriftReport(_Part):
    """Of a log.

    Attributes:
        bundle: Path.
        limits: Of the promise.
        measure: Of confidence.
        share: Of the tokens that were chosen for a comparison with the full model.
        false_alarms: The probability of any alarm while the promise is kept, and apart from that
            of any comparison that says "drifted" while log and calibration are alike.
        domains: In the order of their first request.
    """

    bundle: str
    limits: Limits
    measure: Measure
    share: float
    false_alarms: float
    domains: tuple[DomainDrift, ...]

    @property
    def alarm(self) -> bool:
        """Whether any domain's promise was seen to be broken."""
        return any(each.disagreement.alarm for each in self.domains)


def make_report(
    bundle: str, known: Watched, replayed: Sequence[Replayed], share: float, false_alarms: float
) -> DriftReport:
    """Compares a log with the calibration text, domain by domain.

    Args:
        bundle: Its path.
        known: Of the bundle.
        replayed: All requests.
        share: Of the tokens that were chosen.
        false_alarms: 0..1, exclusive.
    """
    domains = by_domain(replayed)
    tests = len(domains) * (1 + len(known.policy.exits))
    comparer = _Comparer(false_alarms / tests)
    return DriftReport(
        bundle=bundle,
        limits=known.promise.limits,
        measure=known.policy.measure,
        share=share,
        false_alarms=false_alarms,
        domains=tuple(_domain(name, known, each, comparer) for name, each in domains.items()),
    )


class _Comparer:
    """Permutation tests at one level each (Bonferroni), with enough permutations to tell."""

    def __init__(self, level: float) -> None:
        self._level = level
        self._permutations = max(999, int(np.ceil(4 / level)))
        self._rng = np.random.default_rng(SEED)

    def __call__(
        self, calibration: Float64, log: Float64, size: Callable[[Float64], Float64]
    ) -> Comparison:
        found: Distance = permutation_test(calibration, log, size, self._permutations, self._rng)
        return Comparison(
            distance=found.distance,
            p_value=found.p_value,
            drifted=found.p_value <= self._level,
        )


def _domain(
    name: str | None, known: Watched, replayed: Sequence[Replayed], comparer: _Comparer
) -> DomainDrift:
    windows = calibration_units(known.statistics, known.policy, name)
    requests = [each.unit for each in replayed]
    return DomainDrift(
        domain=name,
        requests=len(requests),
        tokens=sum(len(unit.blocks_run) for unit in requests),
        calibration_windows=len(windows),
        exits=_exits(windows, requests, known, comparer),
        confidence=tuple(
            _confidence(windows, requests, known.policy, index, comparer)
            for index in range(len(known.policy.exits))
        ),
        disagreement=_disagreement(windows, replayed, known.promise.limits.max_disagreement),
    )


def _exits(
    windows: Sequence[Unit], requests: Sequence[Unit], known: Watched, comparer: _Comparer
) -> ExitsTaken:
    depths = (*known.policy.exits, known.statistics.blocks)
    calibration, log = (
        exit_shares([unit.blocks_run for unit in units], depths) for units in (windows, requests)
    )
    return ExitsTaken(
        blocks=depths,
        calibration=tuple(calibration.mean(axis=0).tolist()),
        log=tuple(log.mean(axis=0).tolist()),
        comparison=comparer(calibration, log, total_variation),
    )


def _confidence(
    windows: Sequence[Unit],
    requests: Sequence[Unit],
    policy: ExitPolicy,
    index: int,
    comparer: _Comparer,
) -> ConfidenceAt:
    sides = []
    for units in (windows, requests):
        asked = [unit.confidence[:, index] for unit in units]
        asked = [values[~np.isnan(values)] for values in asked]
        sides.append([values for values in asked if len(values)])
    grid = common_grid([*sides[0], *sides[1]]) if sides[0] or sides[1] else np.zeros(0)
    calibration, log = (cumulative(side, grid) for side in sides)
    both = bool(sides[0] and sides[1])
    return ConfidenceAt(
        blocks=policy.exits[index],
        threshold=policy.thresholds[index],
        grid=tuple(grid.tolist()),
        calibration=tuple(calibration.mean(axis=0).tolist()) if sides[0] else (),
        log=tuple(log.mean(axis=0).tolist()) if sides[1] else (),
        comparison=comparer(calibration, log, largest) if both else None,
    )


def _disagreement(
    windows: Sequence[Unit], replayed: Sequence[Replayed], limit: float
) -> Disagreement:
    last = replayed[-1].state
    counted = [each.state for each in replayed if each.unit.loss is not None]
    kept = [counted[i] for i in _spread(len(counted), COURSE)]
    return Disagreement(
        limit=limit,
        calibration=float(np.mean([unit.loss for unit in windows])),
        units=last.units,
        estimate=last.estimate if last.units else None,
        lower=last.lower,
        upper=last.upper,
        alarm=last.alarm,
        alarm_at=last.alarm_at,
        course=Course(
            units=tuple(state.units for state in kept),
            estimate=tuple(state.estimate for state in kept),
            lower=tuple(state.lower for state in kept),
            upper=tuple(state.upper for state in kept),
        ),
    )


def _spread(count: int, most: int) -> list[int]:
    """Numbers below `count`, evenly spread, the first and the last among them."""
    places: list[int] = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()
    return places
