"""Names of graphs and files in a bundle."""

from __future__ import annotations

MANIFEST = "manifest.json"
GRAPHS = "graphs"
ENGINES = "engines"
REPORT = "report"
TOKENIZER = "tokenizer.json"
SHORTCUT = "shortcut.safetensors"
DRAFT = "draft.safetensors"
STATISTICS = "statistics.npz"
CHAT = "chat.json"
# Of a draft layer, in the order of the computation.
DRAFT_GRAPHS = ("draft_memory", "draft", "draft_head")
# The exit head over some tokens alone, which policies ask.
CHECK_HEAD = "check_head"
# Weights of which an exit head has a part for each exit: it is told which exit its rows are of.
OF_EXITS = frozenset({"gates", "exit.scale", "exit.bias", "exit.shift"})
# Begins the name of a graph of a block that stands behind exits.
EXIT_BLOCK = "exit_block_"


def block_name(index: int) -> str:
    """Name of a block's graph."""
    return f"block_{index:02d}"


def exit_block_name(index: int) -> str:
    """Name of the graph of a block that stands behind exits."""
    return f"{EXIT_BLOCK}{index:02d}"


def graph_names(blocks: int, exit_blocks: int = 0) -> list[str]:
    """Every graph of a model, in the order of the computation.

    Args:
        blocks: Of the model.
        exit_blocks: Of its shortcut: the final head follows them, and there is no exit head.
    """
    return ["embed", *map(block_name, range(blocks)), *exit_names(exit_blocks), "final_head"]


def exit_names(exit_blocks: int = 0) -> list[str]:
    """Graphs of a shortcut: its blocks, or else the exit head."""
    return [exit_block_name(index) for index in range(exit_blocks)] or ["exit_head"]
