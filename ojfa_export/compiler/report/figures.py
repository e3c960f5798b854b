"""The report's pictures, as PNG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.shortcuts.matrix_picture import draw_matrix
from ojfa_export.system.pictures import STYLE, png, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart in every common kind of colour blindness; the markers and
# dashes tell the lines apart without colour.
_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ojfa", "one jump (OJFA)", {"color": "#0072B2", "marker": "o", "linewidth": 2.2}),
    ("multi_jump", "a jump per exit (N-NJTC)", {"color": "#D55E00", "marker": "s", "ls": "--"}),
    ("identity", "no jump (identity)", {"color": "#666666", "marker": "^", "ls": ":"}),
    ("residual", "shared residual jump", {"color": "#009E73", "marker": "D", "ls": "-."}),
    ("given", "the shortcut that was given", {"color": "#0072B2", "marker": "o", "linewidth": 2.2}),
)


def precision_by_exit(report: CalibrationReport) -> bytes:
    """Precision@1 of the shortcuts at every exit."""
    return _by_exit(
        report,
        measure="precision_at_1",
        title="Agreement with the full model's next token",
        label="Precision@1 (% of held-out tokens)",
        factor=100,
    )


def surprisal_by_exit(report: CalibrationReport) -> bytes:
    """Mean surprisal of the shortcuts at every exit."""
    return _by_exit(
        report,
        measure="surprisal",
        title="Surprise of the full model at the exit's next token (lower is better)",
        label="Mean surprisal (nats)",
        factor=1,
    )


def precision_matrix(report: CalibrationReport) -> bytes:
    """Precision@1 of every level's jump at every exit, the chosen jump's row marked."""
    assert report.fitted_at is not None
    return draw_matrix(report.precision_at_1, report.fitted_at)


def _mark_level(axes: Axes, fitted_at: int, *, late: bool) -> None:
    axes.axvline(fitted_at, color="#0072B2", linewidth=1, alpha=0.35, zorder=0)
    axes.annotate(
        "one jump fitted here",
        xy=(fitted_at, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if late else 4, -2),
        textcoords="offset points",
        color="#0072B2",
        fontsize=8.5,
        va="top",
        ha="right" if late else "left",
    )


def _by_exit(
    report: CalibrationReport, *, measure: str, title: str, label: str, factor: float
) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        exits = [row.blocks for row in report.exits]
        size = 5 if len(exits) <= 24 else 3
        highest = 0.0
        lines = [line for line in _LINES if getattr(report.exits[0], line[0]) is not None]
        for name, legend, style in lines:
            values = [factor * getattr(getattr(row, name), measure) for row in report.exits]
            axes.plot(exits, values, label=legend, markersize=size, **style)
            highest = max(highest, *values)
        if report.fitted_at is not None:
            _mark_level(axes, report.fitted_at, late=report.fitted_at > report.blocks / 2)
        axes.set_ylim(0, 1.12 * highest or 1)  # room for the note above the lines
        axes.set_title(title)
        axes.set_xlabel(f"exit (blocks run, of {report.blocks})")
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        whole_ticks(axes, len(exits))
        figure.legend(loc="outside lower center", ncols=3 if len(lines) < 4 else 2, frameon=False)
        return png(figure)
