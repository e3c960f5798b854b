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
OF_EXITS = frozenset({"gates", "exit.scale", "exit.bias"})


def block_name(index: int) -> str:
    """Name of a block's graph."""
    return f"block_{index:02d}"


def graph_names(blocks: int) -> list[str]:
    """Every graph of a model with this many blocks, in the order of the computation."""
    return ["embed", *map(block_name, range(blocks)), "exit_head", "final_head"]
