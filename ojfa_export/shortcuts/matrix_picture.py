"""The picture of every level's jump at every exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from ojfa_export.system.pictures import STYLE, png, whole_ticks


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


def _write_cells(axes: Axes, numbers: list[list[int]], *, threshold: float) -> None:
    for row, values in enumerate(numbers, start=1):
        for column, value in enumerate(values, start=1):
            colour = "black" if value > threshold else "white"
            axes.text(column, row, str(value), ha="center", va="center", color=colour, fontsize=8)
