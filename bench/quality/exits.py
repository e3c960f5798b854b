"""Measures a bundle's exits and draws what each costs and gives: the picture of the README.

python -m bench.quality.exits demo.ojfa --out bench/results/demo-exits.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from ojfa_export.planning.bench import bench_bundle
from ojfa_export.system.progress import SILENT

COST, GAIN, MUTED = "#0072B2", "#D55E00", "#666666"


def main() -> None:
    """Measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=400)
    arguments = parser.parse_args()
    measured = bench_bundle(
        arguments.bundle,
        None,
        prompt_length=128,
        warmup=32,
        iterations=arguments.iterations,
        progress=SILENT,
    ).to_json()
    report = json.loads((arguments.bundle / "report" / "report.json").read_text(encoding="utf-8"))
    result = {"bench": measured, "report": {key: report[key] for key in ("rank", "kind", "exits")}}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(measured, report, arguments.out.with_suffix(".png"))


def draw(measured: dict[str, Any], report: dict[str, Any], path: Path) -> None:
    """Two panels over blocks run: milliseconds per token, and agreement with the full model."""
    blocks = [row["blocks"] for row in measured["exits"]]
    times = [row["decode_ms_median"] for row in measured["exits"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(blocks, times, "o-", color=COST)
    left.set(xlabel="blocks run", ylabel="ms per token", ylim=(0, None), title="What an exit costs")
    left.annotate(
        f"full: {times[-1]:.2f} ms",
        (blocks[-1], times[-1]),
        textcoords="offset points",
        xytext=(-8, -2),
        ha="right",
        color=MUTED,
    )
    depths = [*(row["blocks"] for row in report["exits"]), report["blocks"]]
    styles = (
        (report["kind"], "one jump for all exits", "o-", GAIN),
        ("multi_jump", "a jump per exit", "s--", MUTED),
    )
    for key, label, style, colour in styles:
        shares = [*(row[key]["precision_at_1"] for row in report["exits"]), 1.0]
        right.plot(depths, shares, style, color=colour, label=label, markersize=4)
    right.set(
        xlabel="blocks run",
        ylabel="same token as the full model",
        ylim=(0, 1.03),
        title=f"What it gives (held-out text, rank {report['rank']})",
    )
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(depths)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
