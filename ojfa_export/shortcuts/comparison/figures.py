"""The comparison's pictures, as PNG bytes."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from ojfa_export.shortcuts.comparison.model import Comparison, KindResult
from ojfa_export.shortcuts.kinds import Kind
from ojfa_export.system.pictures import STYLE, png, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours; markers and dashes tell the lines apart without colour. NJTC lies on
# N-NJTC, and distillation begins at the closed-form residual jump: both are in the table.
_LINES: dict[Kind, tuple[str, dict[str, Any]]] = {
    "residual": ("shared residual jump", {"color": "#009E73", "marker": "D", "linewidth": 2.4}),
    "jtc": ("JTC, full maps", {"color": "#CC79A7", "marker": "v", "ls": "--"}),
    "n-njtc": ("N-NJTC, multi-jump", {"color": "#D55E00", "marker": "s", "ls": "--"}),
    "ojfa": ("OJFA, measured", {"color": "#0072B2", "marker": "o"}),
    "ojfa-cosine": ("OJFA, by cosine", {"color": "#56B4E9", "marker": "P", "ls": "-."}),
    "mixed": ("one jump, levels mixed", {"color": "#E69F00", "marker": "X", "ls": "-."}),
    "identity": ("identity", {"color": "#666666", "marker": "^", "ls": ":"}),
}
_GIVEN = ("#000000", "#882255", "#44AA99", "#999933")
_PANELS = (
    ("precision_at_1", "Precision@1 (%)", 100),
    ("precision_at_5", "Precision@5 (%)", 100),
    ("precision_at_10", "Precision@10 (%)", 100),
    ("surprisal", "Mean surprisal (nats; lower is better)", 1),
)


def _shown(report: Comparison) -> list[tuple[KindResult, str, dict[str, Any]]]:
    """What is drawn, its label and its look."""
    fitted = [(report.of(kind), label, style) for kind, (label, style) in _LINES.items()]
    given = [
        (each, each.title, {"color": color, "marker": "*", "linewidth": 2.4})
        for each, color in zip(report.given, cycle(_GIVEN), strict=False)
    ]
    return [*given, *fitted]


def quality_by_exit(report: Comparison) -> bytes:
    """Precision@1, 5, 10 and surprisal of the kinds at every exit."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    exits = list(range(1, report.blocks))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True)
        for axes, (measure, title, factor) in zip(panels.flat, _PANELS, strict=True):
            for result, label, style in _shown(report):
                values = [factor * getattr(each, measure) for each in result.exits]
                axes.plot(result.served or exits, values, label=label, markersize=4.5, **style)
            axes.set_title(title)
            axes.set_ylim(0, None)
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
            whole_ticks(axes, len(exits))
        for axes in panels[1]:
            axes.set_xlabel(f"exit (blocks run, of {report.blocks})")
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return png(figure)


def quality_by_cost(report: Comparison) -> bytes:
    """Mean Precision@1 against stored parameters, and against the time of a check."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        stored, checked = figure.subplots(1, 2, sharey=True)
        for result, label, style in _shown(report):
            look = {**style, "ls": "", "label": label, "markersize": 8, "clip_on": False}
            precision = 100 * result.mean("precision_at_1")
            stored.plot([result.parameters], [precision], **look)
            checked.plot([result.check.milliseconds], [precision], **look)
        least, most = _powers(report)
        stored.set_xscale("symlog", linthresh=10**least, linscale=0.5)
        stored.set_xticks([0, *(10**power for power in range(least, most + 1))])
        stored.set_xlim(0, 10**most)
        _name(stored, "What is stored", "parameters (logarithmic from the second mark on)")
        checked.set_xlim(0, 1.1 * max(each.check.milliseconds for each in report.kinds))
        _name(checked, "What a check takes", "milliseconds for one token")
        stored.set_ylim(0, 110 * max(each.mean("precision_at_1") for each in report.kinds) or 1)
        stored.set_ylabel("mean Precision@1 over exits (%)")
        handles, labels = stored.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return png(figure)


def _powers(report: Comparison) -> tuple[int, int]:
    """Powers of ten below and above the numbers of parameters that are not 0."""
    stored = [each.parameters for each in report.kinds if each.parameters]
    return len(str(min(stored))) - 1, len(str(max(stored)))


def _name(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
