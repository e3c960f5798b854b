"""Watches a promise at run time: a running estimate of disagreement, and an alarm.

A **unit** is one request, and its loss the share of its checked tokens that differ from the full
model's choice, in [0, 1]. Tokens of one request resemble each other, requests much less: alarm and
interval hold for units whose losses have, given the units before, the promised mean at most,
whatever else their distribution. Fed token by token, a long hard request would look like a drift.

The alarm is a test by betting (Waudby-Smith and Ramdas, arXiv 2010.09686) of "the promise is kept",
as Podkopaev and Ramdas (arXiv 2110.06177) watch a deployed model's risk, begun anew at every unit
as in e-detectors (Shin, Ramdas and Rinaldo, arXiv 2203.03532), but with weights that sum to 1: so
it is a bound on ever raising a false alarm, not on how often.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ojfa_export.bundle.promise import Promise
from ojfa_export.errors import UsageError
from ojfa_export.runtime.confidence_sequence import ConfidenceSequence
from ojfa_export.system.arguments import real_number, shown, wrong

DEFAULT_FALSE_ALARMS = 0.01
# Stakes of the alarm's bets as shares of the largest that can't go bankrupt.
_STAKE_SHARES = 0.5 ** np.arange(1, 8)
# How quickly the weight of later starts falls, as t^-(1 + this): a drift that begins at unit t is
# seen about (1 + this) ln(t) / growth units later than one at the start.
_START_DECAY = 0.5


@dataclass(frozen=True)
class State:
    """What is known of a domain after the units so far.

    Attributes:
        units: Requests seen.
        estimate: Their mean loss; NaN before the first.
        lower: Of a confidence sequence: with the promise's confidence the average of the units'
            true mean losses so far is inside the bounds **at every moment** of an infinite run.
        upper: The other end.
        alarm: Whether the promise was seen to be broken; stays once it is raised.
        alarm_at: The unit that raised it, from 1.
    """

    units: int
    estimate: float
    lower: float
    upper: float
    alarm: bool
    alarm_at: int | None


class DisagreementMonitor:
    """Keeps watch over every domain of a promise.

    The chance that any domain ever raises an alarm while all keep the promise is `alpha` at most,
    over a run of any length: each domain has an equal part of it. Requests whose domain isn't known
    are watched by themselves: a mixture of domains that keep a limit keeps it too.

    Args:
        promise: What is watched; its domains are the monitor's.
        alpha: 0..1, exclusive.

    Raises:
        UsageError: `alpha` is out of range.
    """

    def __init__(self, promise: Promise, alpha: float = DEFAULT_FALSE_ALARMS) -> None:
        hint = "one run in a hundred is 0.01"
        alpha = real_number("a false-alarm rate", alpha, 0.0, 1.0, above_low=True, hint=hint)
        if alpha == 1:
            raise wrong("a false-alarm rate", "between 0 and 1", alpha, hint)
        self.alpha = alpha
        limits = promise.limits
        names: list[str | None] = [domain.name for domain in promise.domains]
        if len(names) > 1:
            names.append(None)
        self._domains = {
            name: _Domain(limits.max_disagreement, alpha / len(names), 1 - limits.confidence)
            for name in names
        }

    def update(self, losses: Iterable[float], domain: str | None = None) -> State:
        """Takes the losses of more units, in their order.

        Args:
            losses: In [0, 1]. A token that ran at full depth counts as 0.
            domain: Of the units; None where it isn't known, or the promise has only one.

        Raises:
            UsageError: An unknown domain, or a loss outside [0, 1].
        """
        watched = self._find(domain)
        for loss in losses:
            if not 0 <= loss <= 1:
                raise UsageError(
                    f"a loss is a share between 0 and 1, not {loss:g}",
                    hint="give the share of a request's checked tokens that differ",
                )
            watched.add(float(loss))
        return watched.state()

    def state(self, domain: str | None = None) -> State:
        """What is known now.

        Raises:
            UsageError: An unknown domain.
        """
        return self._find(domain).state()

    @property
    def alarms(self) -> list[str | None]:
        """The domains whose promise was seen to be broken; None: requests of unknown domain."""
        return [name for name, domain in self._domains.items() if domain.alarm_at is not None]

    def _find(self, domain: str | None) -> _Domain:
        if domain is None and len(self._domains) == 1:
            return next(iter(self._domains.values()))
        if not isinstance(domain, str | None) or domain not in self._domains:
            raise UsageError(
                f"domain {shown(domain)} has no promise",
                hint=f"the promise's domains: {', '.join(filter(None, self._domains))}",
            )
        return self._domains[domain]


class _Domain:
    """One domain's test and sums.

    The alarm bets that the mean loss is above the limit, with several stakes, and from every unit
    on anew: a bet begun before the drift has lost its wealth when it comes. The stakes share the
    initial wealth of 1, and of each share the part t^-d - (t+1)^-d begins at unit t. All together
    this is a non-negative supermartingale while the promise is kept, which ever reaches 1 / level
    with probability `level` at most (Ville, 1939; betting: arXiv 2010.09686).
    """

    def __init__(self, limit: float, level: float, alpha: float) -> None:
        self.alarm_at: int | None = None
        self._limit = limit
        self._level = level
        self._losses = ConfidenceSequence(alpha, guess=limit)
        self._stakes = _STAKE_SHARES / limit
        self._wealth = np.zeros(len(self._stakes))

    def add(self, loss: float) -> None:
        """Takes one unit's loss."""
        self._losses.add(loss)
        if self.alarm_at is not None:
            return
        t = self._losses.count
        unspent = (t + 1) ** -_START_DECAY
        starting = (t**-_START_DECAY - unspent) / len(self._stakes)
        self._wealth = (self._wealth + starting) * (1 + self._stakes * (loss - self._limit))
        if self._wealth.sum() + unspent >= 1 / self._level:
            self.alarm_at = t

    def state(self) -> State:
        """What is known now."""
        lower, upper = self._losses.bounds()
        return State(
            units=self._losses.count,
            estimate=self._losses.mean,
            lower=lower,
            upper=upper,
            alarm=self.alarm_at is not None,
            alarm_at=self.alarm_at,
        )
