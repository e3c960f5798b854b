"""Text for a promise: windows that neither fitted the shortcut nor chose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ojfa_export.bundle.promise import Limits
from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CalibrationError
from ojfa_export.models.calibration_text import CalibrationText
from ojfa_export.promises.collect import TOKENS_PER_WINDOW
from ojfa_export.promises.p_values import windows_needed

# Of the windows that are left, for the choice of measure, exits and path.
TUNING_SHARE = 0.25
# At most, in each domain: more windows only bring the certified risk nearer to the limit, by
# about 3 / windows at a confidence of 95%.
TUNING_WINDOWS = 64
CERTIFICATION_WINDOWS = 256
# The same without a promise, to plan with, for a fortieth of the time: 512 tokens of a domain give
# a share to within 0.02 or 0.03 (one standard error), most of it from how windows differ. Their
# middle is where steps are timed (`planning.turns.PAST`).
PLANNING_WINDOWS = 8, 16
PLANNING_LENGTH, PLANNING_TOKENS = 256, 32


@dataclass(frozen=True, eq=False)
class PromiseWindows:
    """Windows of each domain.

    Attributes:
        domains: Names, in the order of their first source.
        tuning: For each domain, [n, length] int32.
        certification: For each domain, [n, length] int32, from other parts of the text.
        given: First tokens of each window that don't count.
        sampled: Tokens that are looked at in each window, at most.
    """

    domains: tuple[str, ...]
    tuning: tuple[Int32, ...]
    certification: tuple[Int32, ...]
    given: int = 0
    sampled: int = TOKENS_PER_WINDOW

    def of(self, split: str) -> tuple[Int32, ...]:
        """A split's windows, by its name in statistics."""
        return {"tuning": self.tuning, "certification": self.certification}[split]

    @property
    def counted(self) -> int:
        """Tokens of a window that count."""
        return int(self.tuning[0].shape[1]) - self.given


def promise_windows(
    texts: Sequence[CalibrationText], rest: Sequence[Int32], limits: Limits
) -> PromiseWindows:
    """Divides what is left of the calibration text.

    Tuning takes the beginning of each source, so that few documents are in both splits;
    certification takes windows that are spread evenly over the remainder, so that few are
    neighbours, which resemble each other.

    Args:
        texts: The sources.
        rest: Of each source, the windows that are free.
        limits: What is to be promised.

    Raises:
        CalibrationError: A domain has fewer windows than the promise needs at the least.
    """
    needed = most_needed(limits)
    for domain, sources in _by_domain(texts, rest).items():
        if sum(len(windows) - _tuning(windows) for windows in sources) < needed:
            raise _too_little(domain, texts, sources, needed, limits)
    return _divide(_by_domain(texts, rest), TUNING_WINDOWS, CERTIFICATION_WINDOWS)


def most_needed(limits: Limits) -> int:
    """Windows of a domain that certification needs at the least."""
    return max(windows_needed(limit, limits.confidence) for limit in limits.shares())


def planning_windows(
    texts: Sequence[CalibrationText], rest: Sequence[Int32]
) -> PromiseWindows | None:
    """A few short windows of what is left, divided alike, where nothing is to be promised.

    Args:
        texts: The sources.
        rest: Of each source, the windows that are free.

    Returns:
        Those of the domains that have some for both splits; None where no domain has.
    """
    enough = {
        domain: sources
        for domain, sources in _by_domain(texts, rest).items()
        if any(map(_tuning, sources))
    }
    if not enough:
        return None
    short = {
        domain: [windows[:, :PLANNING_LENGTH] for windows in sources]
        for domain, sources in enough.items()
    }
    return replace(_divide(short, *PLANNING_WINDOWS), sampled=PLANNING_TOKENS)


def _by_domain(texts: Sequence[CalibrationText], rest: Sequence[Int32]) -> dict[str, list[Int32]]:
    """The free windows of each domain's sources."""
    domains: dict[str, list[Int32]] = {}
    for text, windows in zip(texts, rest, strict=True):
        domains.setdefault(text.domain, []).append(windows)
    return domains


def tuning_part(windows: Int32) -> Int32:
    """Of a source's free windows, those that none is certified on, whatever is promised."""
    return windows[: _tuning(windows)]


def _tuning(windows: Int32) -> int:
    """How many of a source's windows are for tuning, from its beginning."""
    return int(TUNING_SHARE * len(windows))


def _divide(
    domains: Mapping[str, Sequence[Int32]], most_tuning: int, most_certification: int
) -> PromiseWindows:
    return PromiseWindows(
        tuple(domains),
        tuple(_spread(list(map(tuning_part, each)), most_tuning) for each in domains.values()),
        tuple(
            _spread([w[_tuning(w) :] for w in each], most_certification)
            for each in domains.values()
        ),
    )


def _spread(sources: Sequence[Int32], count: int) -> Int32:
    """At most so many windows, evenly spread over all that there are."""
    together = np.concatenate(sources)
    if len(together) <= count:
        return together
    return together[np.linspace(0, len(together) - 1, count).astype(np.int64)]


def _too_little(
    domain: str,
    texts: Sequence[CalibrationText],
    sources: Sequence[Int32],
    needed: int,
    limits: Limits,
) -> CalibrationError:
    found, length = sum(map(len, sources)), sources[0].shape[1]
    wanted = int(np.ceil(needed / (1 - TUNING_SHARE)))
    size = sum(text.size for text in texts if text.domain == domain)
    hint = f"give several times its {size:,} bytes"
    if found:
        # The rest grows with the text from what fitting leaves.
        hint = f"give at least {max(2, round(size * (wanted / found))):,} bytes of it"
    return CalibrationError(
        f"domain '{domain}' has too little text for the promise: {found} windows of {length} "
        f"tokens are left beside those for fitting, and at most {limits.max_disagreement:g} "
        f"disagreement with confidence {limits.confidence:g} needs {wanted}, even if no token "
        "differs",
        hint=f"{hint}, or promise less",
    )
