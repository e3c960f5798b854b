"""Draws `life-of-a-request.png`: python docs/life_of_a_request.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

BLOCKS, EXITS = 12, (6, 9)
PREFIX, PIECE, PIECES = 4, 4, 2
# Blocks that computed the logits at the last token of the prompt and at each generated token.
DEPTHS = (6, 9, 6, 12, 6)
STAGES = (
    ("submit", "prompt is encoded,\noptions are checked"),
    ("queue", "waits; is refused\nwhere it is full"),
    ("admission", "slot and pages; takes\nover a known prefix"),
    ("prefill", "in pieces, between\nsteps of others"),
    ("decode steps", "a head is asked\nat each exit"),
    ("tokens", "text as it is certain,\nto thread or task"),
    ("end", "slot stays for its\nprefix, until needed"),
)
COLORS = {
    "prefix taken over from another request": "#c9c9c9",
    "prefill, first piece": "#9ecae1",
    "prefill, second piece": "#4292c6",
    "decode step": "#31a354",
    "caught up in the pass of a deeper token": "#fdae6b",
}
GREY, FIRST, SECOND, STEP, LATE = COLORS.values()


def draw_stages(axes: Axes) -> None:
    """The stations, from left to right."""
    axes.set_xlim(0, len(STAGES))
    axes.set_ylim(0, 1)
    axes.axis("off")
    for index, (name, what) in enumerate(STAGES):
        box = FancyBboxPatch(
            (index + 0.06, 0.1), 0.8, 0.8, boxstyle="round,pad=0.03", fc="#f4f6f8", ec="#555555"
        )
        axes.add_patch(box)
        axes.text(index + 0.46, 0.72, name, ha="center", va="center", weight="bold", size=11)
        axes.text(index + 0.46, 0.36, what, ha="center", va="center", size=8.6)
        if index:
            arrow = {"arrowstyle": "-|>", "color": "#555555"}
            axes.annotate("", (index + 0.04, 0.5), (index - 0.12, 0.5), arrowprops=arrow)


def draw_blocks(axes: Axes) -> None:
    """Which blocks ran each token, and in which pass; the watermarks are the upper edges."""
    prompt = PREFIX + PIECE * PIECES
    for position in range(prompt):
        piece = (position - PREFIX) // PIECE
        color = GREY if position < PREFIX else (FIRST, SECOND)[piece]
        _cells(axes, position, 0, BLOCKS if position < PREFIX else DEPTHS[0], color)
    done = [BLOCKS] * PREFIX + [DEPTHS[0]] * (prompt - PREFIX)
    for index, depth in enumerate(DEPTHS):
        position = prompt - 1 + index
        if index:
            _cells(axes, position, 0, depth, STEP)
            done.append(depth)
        for earlier in range(position):
            if done[earlier] < depth:
                _cells(axes, earlier, done[earlier], depth, LATE)
                done[earlier] = depth
        head = "full" if depth == BLOCKS else f"exit {depth}"
        axes.text(position + 0.5, BLOCKS + 0.35, head, ha="center", size=8.5, weight="bold")
    for depth in EXITS:
        axes.axhline(depth, color="#b2182b", lw=1, ls="--")
        axes.text(-0.15, depth, f"exit {depth}", ha="right", va="center", color="#b2182b", size=9)
    _label(axes, prompt)


def _cells(axes: Axes, position: int, start: int, stop: int, color: str) -> None:
    for block in range(start, stop):
        axes.add_patch(Rectangle((position, block), 1, 1, fc=color, ec="white", lw=1))


def _label(axes: Axes, prompt: int) -> None:
    last = prompt + len(DEPTHS) - 1
    axes.set_xlim(0, last)
    axes.set_ylim(0, BLOCKS + 1.2)
    axes.set_yticks([0.5, BLOCKS - 0.5], ["block 1", f"block {BLOCKS}"])
    axes.set_xticks([prompt / 2, (prompt + last) / 2], ["tokens of the prompt", "generated tokens"])
    axes.axvline(prompt, color="#555555", lw=1)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [Patch(color=color, label=name) for name, color in COLORS.items()]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False
    )
    axes.set_title(
        "Blocks that ran each token of one request, and the head that chose the next",
        loc="left",
        size=11,
    )


def main() -> None:
    """Writes the picture beside this file."""
    figure, (stages, blocks) = plt.subplots(
        2, 1, figsize=(12.5, 6.6), height_ratios=(1, 3), layout="constrained"
    )
    draw_stages(stages)
    draw_blocks(blocks)
    figure.savefig(Path(__file__).with_name("life-of-a-request.png"), dpi=110)


if __name__ == "__main__":
    main()
