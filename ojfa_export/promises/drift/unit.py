"""What a policy did to the tokens of one request, or of one window of the calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ojfa_export.decoding.events import Event, ExitTaken, ShadowCheck
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BundleError
from ojfa_export.promises.measures import round_down
from ojfa_export.promises.statistics import ExitStatistics


@dataclass(frozen=True, eq=False)
class Unit:
    """One request or window, of n tokens, under a policy with E exits.

    Tokens of one unit resemble each other; units are what can be compared.

    Attributes:
        blocks_run: [n].
        confidence: [n, E] float16, rounded down; NaN where the exit wasn't asked.
        loss: The share of its checked tokens that differ; None where none was checked.
    """

    blocks_run: NDArray[np.int32]
    confidence: NDArray[np.float16]
    loss: float | None


def calibration_units(
    statistics: ExitStatistics, policy: ExitPolicy, domain: str | None
) -> list[Unit]:
    """The windows of a domain, or of all, as the policy would have run them.

    Raises:
        BundleError: The statistics lack one of the policy's exits.
    """
    for depth in policy.exits:
        if depth not in statistics.exits:
            raise BundleError(
                f"the bundle's statistics lack exit {depth} of its policy",
                hint="build it again with --max-disagreement",
            )
    columns = [statistics.exits.index(depth) for depth in policy.exits]
    confidence = statistics.of(policy.measure)[..., columns].copy()
    sure = confidence >= np.array(policy.thresholds)
    before: NDArray[np.int64] = (
        np.cumsum(sure, axis=-1) - sure
    )  # exits that were sure before this one
    confidence[before > 0] = np.nan
    taken = sure & (before == 0)
    depths = np.full(taken.shape[:-1], statistics.blocks, np.int32)
    for index, depth in enumerate(policy.exits):
        depths[taken[..., index]] = depth
    losses = (taken & ~statistics.agrees[..., columns]).any(axis=-1).mean(axis=-1)
    wanted = range(statistics.windows)
    if domain is not None:
        wanted = statistics.members()[statistics.domains.index(domain)].tolist()
    return [Unit(depths[i], confidence[i], float(losses[i])) for i in wanted]


def request_unit(events: Sequence[Event], policy: ExitPolicy) -> Unit:
    """What a session of one sequence told of its tokens."""
    exits = [event for event in events if isinstance(event, ExitTaken)]
    checks = [event.agrees for event in events if isinstance(event, ShadowCheck)]
    confidence = np.full((len(exits), len(policy.exits)), np.nan)
    for row, event in enumerate(exits):
        confidence[row, : len(event.confidence)] = event.confidence
    return Unit(
        np.array([event.blocks_run for event in exits], np.int32),
        round_down(confidence),
        checks.count(False) / len(checks) if checks else None,
    )
