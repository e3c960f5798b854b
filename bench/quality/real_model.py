"""One picture of what a real model's exits agree in, and what drafts save: the README's first.

    python -m bench.quality.real_model --trained bench/results/trained-smollm2.json \
        --drafts bench/results/drafts-smollm2-8192-tokens.json --out bench/results/smollm2.png

Draws what `bench.quality.trained` and `bench.serving.drafts` have measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.pictures import png

GREY, ORANGE, BLUE = "#666666", "#D55E00", "#0072B2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="of bench.quality.trained")
    parser.add_argument("--drafts", type=Path, required=True, help="of bench.serving.drafts")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    trained, drafts = (
        json.loads(path.read_text(encoding="utf-8")) for path in (options.trained, options.drafts)
    )
    write_atomically(options.out, draw(trained, drafts))


def draw(trained: Mapping[str, Any], drafts: Mapping[str, Any]) -> bytes:
    """A PNG file's bytes."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    figure.suptitle(str(trained["model"]))
    [mlp] = (kind for kind in trained["kinds"] if kind["kind"] == "mlp")
    exits(left, mlp)
    speeds(right, drafts["summary"])
    return png(figure)


def exits(axes: Axes, mlp: Mapping[str, Any]) -> None:
    """Agreement by exit on what the model writes, without a jump and with the trained one."""
    own, depths = mlp["on_its_text"], mlp["outputs"]
    axes.plot(depths, own["begin"]["agreement"], "--", color=GREY, label="no jump")
    label = f"one MLP for all exits, trained ({mlp['parameters'] / 1e6:.1f} M)"
    axes.plot(depths, own["jump"]["agreement"], color=ORANGE, label=label)
    axes.set_title("leaving early: the full model's token", fontsize=10)
    axes.set_xlabel(f"blocks run, of {len(depths) + 1}")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def speeds(axes: Axes, summary: Mapping[str, Mapping[str, float]]) -> None:
    """Milliseconds of a token, with drafts and without."""
    rows = {"full depth": summary["full"]}
    if "default" in summary:
        rows["drafts,\nas planned"] = summary["default"]
    counts = sorted(int(name) for name in summary if name.isdigit())
    rows |= {f"{n} draft{'s' if n > 1 else ''}": summary[str(n)] for n in counts}
    for place, (_, row) in enumerate(rows.items()):
        equal = row["equal"] == row["prompts"]
        axes.barh(place, row["ms_per_token"], color=BLUE if place else GREY, height=0.65)
        said = f"{row['ms_per_token']:.1f} ms"
        if place:
            said += f", {row['speedup']:.2f}x" + ("" if equal else f", {row['equal']:.0f} equal")
        axes.text(row["ms_per_token"], place, f" {said}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * rows["full depth"]["ms_per_token"])
    axes.set_xlabel("ms per token")
    axes.set_title("drafting: the very tokens of full depth", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
