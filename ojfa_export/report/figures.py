"""The report's pictures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ojfa_export.report.model import CalibrationReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart in every common kind of colour blindness; the markers and
# dashes tell the lines apart without colour.
_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ojfa", "one jump (OJFA)", {"color": "#0072B2", "marker": "o", "linewidth": 2.2}),
    ("multi_jump", "a jump per exit (N-NJTC)", {"color": "#D55E00", "marker": "s", "ls": "--"}),
    ("identity", "no jump (identity)", {"color": "#666666", "marker": "^", "ls": ":"}),
    ("residual", "shared residual jump", {"color": "#009E73", "marker": "D", "ls": "-."}),
)
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}


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
    return draw_matrix(report.precision_at_1, report.fitted_at)


def draw_matrix(precision: Sequence[Sequence[float]], chosen: int) -> bytes:
    """Precision@1 [fitted_at - 1][used_at - 1], the row of the chosen level (from 1) marked."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    percent = 100 * np.asarray(precision)
    levels = len(percent)
    side = min(7.0, 3.6 + 0.25 * levels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(side + 1.5, side), layout="constrained")
        axes = figure.add_subplot()
        edges = (0.5, levels + 0.5)
        top = max(1.0, float(percent.max()))
        image = axes.imshow(
            percent, cmap="cividis", vmin=0, vmax=top, origin="lower", extent=(*edges, *edges)
        )
        axes.add_patch(
            Rectangle(
                (0.5, chosen - 0.5), levels, 1, fill=False, ec="#D55E00", lw=2.5,
                clip_on=False,
            )
        )  # fmt: skip
        axes.annotate(
            "chosen",
            xy=(levels + 0.5, chosen),
            xytext=(5, 0),
            textcoords="offset points",
            color="#B04A00",
            va="center",
            weight="bold",
            annotation_clip=False,
        )
        if levels <= 16:
            _write_cells(axes, percent.round().astype(int).tolist(), threshold=0.5 * top)
        axes.set_title("Each level's jump at every exit")
        axes.set_xlabel("used at exit (blocks run)")
        axes.set_ylabel("fitted at exit (blocks run)")
        whole_ticks(axes, levels, both=True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("Precision@1 (%)")
        bar.outline.set_visible(False)
        return png(figure)


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
        late = report.fitted_at > report.blocks / 2
        axes.axvline(report.fitted_at, color="#0072B2", linewidth=1, alpha=0.35, zorder=0)
        axes.annotate(
            "one jump fitted here",
            xy=(report.fitted_at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, -2),
            textcoords="offset points",
            color="#0072B2",
            fontsize=8.5,
            va="top",
            ha="right" if late else "left",
        )
        axes.set_ylim(0, 1.12 * highest or 1)  # room for the note above the lines
        axes.set_title(title)
        axes.set_xlabel(f"exit (blocks run, of {report.blocks})")
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        whole_ticks(axes, len(exits))
        figure.legend(loc="outside lower center", ncols=3 if len(lines) < 4 else 2, frameon=False)
        return png(figure)


def _write_cells(axes: Axes, numbers: list[list[int]], *, threshold: float) -> None:
    for row, values in enumerate(numbers, start=1):
        for column, value in enumerate(values, start=1):
            colour = "black" if value > threshold else "white"
            axes.text(column, row, str(value), ha="center", va="center", color=colour, fontsize=8)


def whole_ticks(axes: Axes, levels: int, *, both: bool = False) -> None:
    """Ticks at whole exits: every one where they fit, else the first and round numbers."""
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100) if levels / step <= 16)
    ticks = sorted({1, *range(step, levels + 1, step)})
    axes.set_xticks(ticks)
    if both:
        axes.set_yticks(ticks)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    # Without metadata there is no library version or date in the bytes.
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
