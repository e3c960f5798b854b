"""The frontier's picture, as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ojfa_export.planning.frontier import Point
from ojfa_export.system.pictures import STYLE, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def frontier(points: Sequence[Point], own: Point | None = None) -> bytes:
    """Milliseconds per token against agreement with the full model.

    Args:
        points: Of the plan.
        own: The bundle's policy, if it has one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    full = next(point for point in points if point.kind == "full")
    fixed = [*(point for point in points if point.kind == "fixed"), full]
    per_token = [point for point in points if point.kind == "auto"]
    drafting = [point for point in points if point.kind == "speculation"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(full.ms, color="#999999", linewidth=1, ls="--", zorder=0)
        axes.plot(
            [p.ms for p in fixed], [p.agreement for p in fixed], "o-", color="#0072B2",
            markersize=5, label="fixed exit",
        )  # fmt: skip
        for point in fixed[:: max(1, len(fixed) // 6)]:
            _note(axes, point, str(point.exit or "full"), (0, -13), "#0072B2")
        if per_token:
            axes.plot(
                [p.ms for p in per_token], [p.agreement for p in per_token], "s",
                color="#D55E00", markersize=5, label="exits per token (share that may differ)",
            )  # fmt: skip
            for point in per_token:
                _note(axes, point, f"{point.limit:.3g}", (0, 7), "#B04A00")
        if own is not None:
            axes.plot([own.ms], [own.agreement], "*", color="#009E73", markersize=13,
                      label="this bundle's policy")  # fmt: skip
        if drafting:
            best = min(drafting, key=lambda point: point.ms)
            axes.plot([best.ms], [1.0], "D", color="#CC79A7", markersize=7,
                      label=best.name)  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.09)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title("What each way of decoding costs and gives")
        axes.set_xlabel("ms per token (dashed: full depth)")
        axes.set_ylabel("same token as the full model")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return png(figure)


def _note(axes: Axes, point: Point, text: str, offset: tuple[int, int], colour: str) -> None:
    axes.annotate(
        text,
        (point.ms, point.agreement),
        textcoords="offset points",
        xytext=offset,
        ha="center",
        fontsize=8,
        color=colour,
    )
