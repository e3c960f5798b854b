"""The picture of a drift report: a row for each domain."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from ojfa_export.errors import UsageError
from ojfa_export.promises.drift.report import DomainDrift, DriftReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, as in the bundle's report.
CALIBRATION, LOG, LIMIT = "#666666", "#0072B2", "#D55E00"


def check_picture(path: Path) -> None:
    """Checks that a picture can be drawn there, before the work that it would show.

    Raises:
        UsageError: matplotlib isn't installed, or there is no such folder.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a picture needs matplotlib, which isn't installed",
            hint="pip install 'ojfa-export[build]', or leave --picture out",
        )
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(
            f"the picture can't be written to {path}", hint="name a file in an existing folder"
        )


def draw(report: DriftReport) -> bytes:
    """Exits taken, confidence at the first exit, and the running estimate, as PNG bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from ojfa_export.system.pictures import STYLE

    with mpl.rc_context(STYLE):
        rows = len(report.domains)
        figure = Figure(figsize=(12.5, 0.6 + 3.4 * rows), layout="constrained")
        grid = figure.subplots(rows, 3, squeeze=False)
        for axes, drift in zip(grid, report.domains, strict=True):
            _exits(axes[0], drift)
            _confidence(axes[1], drift, report.measure)
            _disagreement(axes[2], drift)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def _exits(axes: Axes, drift: DomainDrift) -> None:
    exits = drift.exits
    places = range(len(exits.blocks))
    for offset, shares, colour, label in (
        (-0.2, exits.calibration, CALIBRATION, "calibration"),
        (0.2, exits.log, LOG, "log"),
    ):
        bars = axes.bar(
            [place + offset for place in places],
            [100 * share for share in shares],
            0.38,
            color=colour,
            label=label,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(list(places), [str(blocks) for blocks in exits.blocks[:-1]] + ["full"])
    axes.set_ylim(0, 112)
    axes.set_ylabel("% of tokens")
    axes.set_xlabel("exit (blocks run)")
    name = "no domain named" if drift.domain is None else drift.domain
    said = "drifted" if exits.comparison.drifted else "as calibrated"
    axes.set_title(f"{name}: exits taken, {said}")
    axes.legend(frameon=False, loc="best")


def _confidence(axes: Axes, drift: DomainDrift, measure: str) -> None:
    first = drift.confidence[0]
    for values, colour, label, style in (
        (first.calibration, CALIBRATION, "calibration", "--"),
        (first.log, LOG, "log", "-"),
    ):
        if values:
            axes.step(first.grid, [100 * value for value in values], where="post", color=colour,
                      label=label, ls=style, lw=1.8)  # fmt: skip
    axes.axvline(first.threshold, color=LIMIT, lw=1.2, ls=":", label="threshold")
    axes.set_ylim(0, 100)
    axes.set_xlabel("negated entropy (nats)" if measure == "entropy" else f"{measure} probability")
    axes.set_ylabel("% of tokens at or below")
    drifted = first.comparison is not None and first.comparison.drifted
    said = "drifted" if drifted else "as calibrated"
    axes.set_title(f"Confidence at exit {first.blocks}, {said}")
    axes.legend(frameon=False, loc="best")


def _disagreement(axes: Axes, drift: DomainDrift) -> None:
    found = drift.disagreement
    course = found.course
    percent = {
        name: [100 * value for value in getattr(course, name)]
        for name in ("estimate", "lower", "upper")
    }
    axes.fill_between(course.units, percent["lower"], percent["upper"], color=LOG, alpha=0.18,
                      label="interval, at every moment", lw=0)  # fmt: skip
    axes.plot(course.units, percent["estimate"], color=LOG, lw=1.8, label="estimate")
    axes.axhline(100 * found.limit, color=LIMIT, lw=1.4, label=f"promised: {found.limit:.1%}")
    axes.axhline(100 * found.calibration, color=CALIBRATION, lw=1.2, ls="--", label="calibration")
    if found.alarm_at is not None:
        axes.axvline(found.alarm_at, color=LIMIT, lw=1.2, ls=":", label="alarm")
    # Wide open at the beginning, where little is known: what matters is near the limit.
    highest = max(2.5 * 100 * found.limit, *(2.2 * value for value in percent["estimate"][-1:]))
    axes.set_ylim(0, min(100, highest))
    axes.set_xlabel("requests")
    axes.set_ylabel("% of tokens that differ")
    axes.set_title("Disagreement, ALARM" if found.alarm else "Disagreement, no alarm")
    axes.legend(loc="upper right", fontsize=8.5, framealpha=0.85, edgecolor="none")
