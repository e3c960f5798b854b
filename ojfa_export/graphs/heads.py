"""Hidden states to logits: the model's own head, and the shortcut's."""

from __future__ import annotations

import numpy as np
import onnx

from ojfa_export.bundle.names import CHECK_HEAD
from ojfa_export.graphs.dialect import Portable, Weights
from ojfa_export.graphs.graph import FLOAT, INT32
from ojfa_export.models.spec import ModelSpec

_ABOUT = {
    "exit_head": "Any block's output to logits: shortcut, final norm and LM head",
    CHECK_HEAD: "Any block's output to logits of frequent tokens: shortcut, final norm and rows of "
    "the LM head",
}


def final_head_graph(
    spec: ModelSpec,
    weights: Weights,
    dialect: Portable,
    name: str = "final_head",
    about: str = "The last block's output to logits: final norm and LM head",
) -> onnx.ModelProto:
    """Final norm and LM head.

    Args:
        spec: The model.
        weights: `final_norm.weight` (and `.bias`), `head` [V, H].
        dialect: The operators to write it in.
        name: Of the graph.
        about: What it does.
    """
    graph = dialect.graph(name, about)
    hidden = graph.input("hidden", FLOAT, "rows", spec.hidden_size)
    normed = dialect.norm(graph, hidden, weights, "final_norm")
    logits = dialect.vocabulary(graph, normed, weights, "head")
    logits = dialect.softcapped(graph, logits, spec.logit_softcap)
    graph.output(logits, "logits", FLOAT, "rows", spec.vocab_size)
    return graph.model()


def exit_head_graph(
    spec: ModelSpec, weights: Weights, dialect: Portable, name: str = "exit_head"
) -> onnx.ModelProto:
    """The shortcut, folded with final norm and LM head (design: `graphs.fold`).

    Args:
        spec: The model.
        weights: `project` [H, k] and `project.bias` [k], fp32; `vocabulary` [V, k]; for LayerNorm
            models `vocabulary.bias` [V].
        dialect: The operators to write it in.
        name: Of the graph.
    """
    graph = dialect.graph(name, _ABOUT[name])
    hidden = graph.input("hidden", FLOAT, "rows", spec.hidden_size)
    projected = graph.op("MatMul", hidden, graph.weight("project", weights["project"]))
    projected = graph.op("Add", projected, graph.weight("project.bias", weights["project.bias"]))
    normed = dialect.unit_norm(graph, projected, weights["project"].dims[1])
    logits = dialect.vocabulary(graph, normed, weights, "vocabulary")
    if "vocabulary.bias" in weights:
        bias = graph.weight("vocabulary.bias", weights["vocabulary.bias"])
        logits = graph.op("Add", logits, bias)
    logits = dialect.softcapped(graph, logits, spec.logit_softcap)
    graph.output(logits, "logits", FLOAT, "rows", spec.vocab_size)
    return graph.model()


def jump_head_graph(
    spec: ModelSpec, weights: Weights, dialect: Portable, name: str = "exit_head"
) -> onnx.ModelProto:
    """The exit head of whatever shortcut the weights are of, or the check head.

    Where blocks stand behind exits, a check head is the model's own head over some tokens.

    Args:
        spec: The model; for a check head, of as many tokens as that has.
        weights: Those of the emitter that is of the shortcut.
        dialect: The operators to write it in.
        name: "exit_head" or "check_head".
    """
    for part, make in (("gates", residual_head_graph), ("exit.scale", mlp_head_graph)):
        if part in weights:
            return make(spec, weights, dialect, name)
    if "project" not in weights:
        return final_head_graph(spec, weights, dialect, name, _ABOUT[name])
    return exit_head_graph(spec, weights, dialect, name)


def mlp_head_graph(
    spec: ModelSpec, weights: Weights, dialect: Portable, name: str = "exit_head"
) -> onnx.ModelProto:
    """The MLP shortcut, then final norm and LM head.

    Each row says after how many blocks it comes, which picks the scale of the MLP's input and the
    bias of its first product (design: `bundle.mlp_shortcut`).

    Args:
        spec: The model.
        weights: `exit.scale` [L-1, H] and `exit.bias` [L-1, columns], fp32; `mlp.up.weight`
            [H, columns] and `mlp.down.weight` [width, H]; and those of the final head.
        dialect: The operators to write it in.
        name: Of the graph.
    """
    graph = dialect.graph(name, _ABOUT[name])
    hidden = graph.input("hidden", FLOAT, "rows", spec.hidden_size)
    blocks_run = graph.input("blocks_run", INT32, "rows")
    index = graph.op("Sub", blocks_run, graph.constant(1, np.int32))
    scale, bias = (
        graph.op("Gather", graph.weight(name, weights[name]), index)
        for name in ("exit.scale", "exit.bias")
    )
    scaled = graph.op("Mul", dialect.plain_norm(graph, hidden), scale)
    up = dialect.linear(graph, dialect.to_compute(graph, scaled), weights, "mlp.up")
    width = weights["mlp.down.weight"].dims[0]
    inner = dialect.activated(graph, dialect.residual(graph, bias, up), width)
    down = dialect.linear(graph, dialect.to_compute(graph, inner), weights, "mlp.down")
    normed = dialect.norm(graph, dialect.residual(graph, hidden, down), weights, "final_norm")
    logits = dialect.vocabulary(graph, normed, weights, "head")
    logits = dialect.softcapped(graph, logits, spec.logit_softcap)
    graph.output(logits, "logits", FLOAT, "rows", spec.vocab_size)
    return graph.model()


def residual_head_graph(
    spec: ModelSpec, weights: Weights, dialect: Portable, name: str = "exit_head"
) -> onnx.ModelProto:
    """The residual shortcut, then final norm and LM head: its output has no low rank to fold.

    Each row says after how many blocks it comes, which picks its gate.

    Args:
        spec: The model.
        weights: `project` [H, r], `project.bias` [r], `up` [r, H] and `gates` [L-1], fp32; and
            those of the final head.
        dialect: The operators to write it in.
        name: Of the graph.
    """
    graph = dialect.graph(name, _ABOUT[name])
    hidden = graph.input("hidden", FLOAT, "rows", spec.hidden_size)
    blocks_run = graph.input("blocks_run", INT32, "rows")
    projected = graph.op("MatMul", hidden, graph.weight("project", weights["project"]))
    projected = graph.op("Add", projected, graph.weight("project.bias", weights["project.bias"]))
    jump = graph.op("MatMul", projected, graph.weight("up", weights["up"]))
    index = graph.op("Sub", blocks_run, graph.constant(1, np.int32))
    gate = graph.op("Gather", graph.weight("gates", weights["gates"]), index)
    gate = graph.op("Unsqueeze", gate, graph.constant([1], np.int64))
    jumped = graph.op("Add", hidden, graph.op("Mul", jump, gate))
    normed = dialect.norm(graph, jumped, weights, "final_norm")
    logits = dialect.vocabulary(graph, normed, weights, "head")
    logits = dialect.softcapped(graph, logits, spec.logit_softcap)
    graph.output(logits, "logits", FLOAT, "rows", spec.vocab_size)
    return graph.model()
