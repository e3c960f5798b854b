"""A picture of a comparison: time per token against blocks run, and the peers at full depth.

python -m bench.cpu.plot bench/results/cpu.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

COLOURS = {
    "monolithic": "#555555",
    "transformers": "#c44e52",
    "onnxruntime-genai": "#dd8452",
}
CHAIN_COLOUR = "#2a6fbb"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws a recorded comparison.")
    parser.add_argument("result", type=Path, help="JSON file that bench.cpu.compare wrote")
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text())
    plot_races(result["shapes"], options.result.with_suffix(".png"))


def plot_races(shapes: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws one panel for each shape and cache length.

    Args:
        shapes: What `bench.cpu.one_shape` wrote.
        path: The PNG to write.
    """
    rows = max(len(shape["past"]) for shape in shapes)
    size = (4.8 * len(shapes), 3.4 * rows)
    figure, axes = plt.subplots(
        rows, len(shapes), figsize=size, squeeze=False, layout="constrained"
    )
    for column, shape in enumerate(shapes):
        for row, (past, contestants) in enumerate(shape["past"].items()):
            _draw(axes[row][column], contestants)
            axes[row][column].set_title(
                f"{shape['shape']}, {past} tokens in the cache", fontsize=10
            )
        axes[-1][column].set_xlabel("blocks run")
    for row in axes:
        row[0].set_ylabel("ms per token")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Axes, contestants: Sequence[dict[str, Any]]) -> None:
    chain = [each for each in contestants if each["name"].startswith("chain-")]
    peers = [each for each in contestants if each["name"] in COLOURS]
    blocks, times = [each["blocks"] for each in chain], [each["ms_median"] for each in chain]
    label = f"chain at every exit; full depth {times[-1]:.3g}"
    axis.plot(blocks, times, "o-", color=CHAIN_COLOUR, markersize=4, label=label)
    # A linear axis shows whether time is linear in blocks; a peer far above has its place in the
    # legend only.
    top = 2.2 * max(times)
    for each in sorted(peers, key=lambda each: float(each["ms_median"])):
        above = " (off the scale)" if each["ms_median"] > top else ""
        label = f"{each['name']} {each['ms_median']:.3g}{above}"
        axis.axhline(
            each["ms_median"],
            color=COLOURS[each["name"]],
            linestyle="--",
            linewidth=1.2,
            label=label,
        )
    axis.set_ylim(0, top)
    axis.set_xlim(0, max(blocks) + 0.5)
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="upper left", fontsize=7, framealpha=0.9)


if __name__ == "__main__":
    main()
