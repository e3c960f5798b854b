"""The picture of `bench.serving.scaling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BLUES = {0.0: "#0b2e4f", 0.25: "#1a6faf", 0.5: "#4c8f3f", 0.75: "#d1711f", 1.0: "#b02a2a"}
ROUTINGS = {
    "at random": ("0.6", ":"),
    "fewer of two": ("0.35", "--"),
    "fewest requests": ("#8a4fb0", "-"),
    "least loaded": ("#1a6faf", "-"),
    "by depth": ("#d1711f", "-"),
    "by depth, 10% misjudged": ("#d1711f", ":"),
    "by prefix": ("#4c8f3f", "-"),
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws goodput of one machine, and of eight by routing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    one, depth, prefix = figure.subplots(1, 3)
    limits = result["limits"]
    for row in result["one_machine"]:
        share = row["shallow"]
        _curve(one, row["curve"], f"{share:.0%}", BLUES[share], "-")
    _finish(one, "One machine", "requests a second", "share at half depth")
    wanted = [row for row in result["depth"] if (row["machines"], row["shallow"]) == (8, 0.5)]
    _routings(depth, wanted, "8 machines, half of the requests at half depth")
    few = max(row["prefixes"] for row in result["prefix"])
    wanted = [row for row in result["prefix"] if (row["machines"], row["prefixes"]) == (8, few)]
    _routings(prefix, wanted, f"8 machines, 90% have one of {few} prefixes")
    figure.suptitle(
        f"Goodput, simulated: first token within {limits['first']:g} ms and "
        f"p99 between tokens within {limits['between']:g} ms (H200, Llama-2-7B's shape, fp16)"
    )
    figure.savefig(path, dpi=98)


def _routings(axes: Any, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    for row in rows:
        colour, style = ROUTINGS[row["routing"]]
        _curve(axes, row["curve"], row["routing"], colour, style)
    _finish(axes, title, "requests a second, of each machine", "routing")


def _curve(
    axes: Any, curve: Sequence[Mapping[str, Any]], label: str, colour: str, style: str
) -> None:
    asked, good = [each["asked"] for each in curve], [each["good"] for each in curve]
    axes.plot(asked, good, style, marker="o", markersize=3, color=colour, label=label)


def _finish(axes: Any, title: str, across: str, legend: str) -> None:
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="0.85", zorder=0)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across)
    axes.set_ylabel("of them within both limits")
    axes.legend(title=legend, fontsize=8, title_fontsize=8)
    axes.grid(alpha=0.3)
