"""How every picture looks, and its bytes as a PNG file."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from ojfa_export.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}


def check_can_draw() -> None:
    """Checks that a report can be drawn, before the work that it would show.

    Raises:
        UsageError: matplotlib isn't installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "the report is drawn by matplotlib, which isn't installed",
            hint="pip install 'ojfa-export[build]'",
        )


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
