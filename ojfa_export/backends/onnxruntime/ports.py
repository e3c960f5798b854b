"""Does an engine take and give what a model of these sizes has?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from ojfa_export.bundle.names import CHECK_HEAD, EXIT_BLOCK
from ojfa_export.errors import BackendError
from ojfa_export.models.spec import ModelSpec

# By name: ONNX Runtime's type, and sizes; None for what varies.
Ports = dict[str, tuple[str, tuple[int | None, ...]]]
FLOAT, INT32, INT64 = "tensor(float)", "tensor(int32)", "tensor(int64)"


def check_ports(session: ort.InferenceSession, spec: ModelSpec, name: str, depths: int = 0) -> None:
    """Compares an engine's inputs and outputs with what will be bound to them.

    Args:
        session: The engine.
        spec: The model.
        name: Of the engine's graph.
        depths: Of a draft layer: how many states it sees of each position.

    Raises:
        BackendError: They differ.
    """
    found = _ports(session.get_inputs()), _ports(session.get_outputs())
    if name == CHECK_HEAD:
        spec = _of_some_tokens(spec, found[1])
    wanted = _expected(spec, name, depths, gated="blocks_run" in found[0])
    for what, has, needs in zip(("inputs", "outputs"), found, wanted, strict=True):
        if has != needs:
            raise BackendError(
                f"the engine '{name}' has other {what} than a model of these sizes: {has} instead "
                f"of {needs}",
                hint="don't use this bundle: build it again",
            )


def _of_some_tokens(spec: ModelSpec, outputs: Ports) -> ModelSpec:
    """The model, of as many tokens as a head has logits, where it has no more than the model."""
    _, shape = outputs.get("logits", ("", ()))
    width = shape[-1] if shape else None
    fits = width is not None and 0 < width <= spec.vocab_size
    return spec.with_vocabulary(width) if width is not None and fits else spec


def _expected(spec: ModelSpec, name: str, depths: int, *, gated: bool) -> tuple[Ports, Ports]:
    """Inputs and outputs of a graph's engine; see `dialect.OnnxRuntimeCpu`."""
    if name == "embed":
        embedded = (FLOAT, (None, None, spec.hidden_size))
        names = ("token_ids", "positions") if spec.learned_positions else ("token_ids",)
        return dict.fromkeys(names, (INT32, (None, None))), {"hidden": embedded}
    if name == "draft_memory":
        memory = (FLOAT, (None, spec.hidden_size))
        return {"states": (FLOAT, (None, depths * spec.hidden_size))}, {"memory": memory}
    if name in ("exit_head", CHECK_HEAD, "final_head", "draft_head"):
        inputs: Ports = {"hidden": (FLOAT, (None, spec.hidden_size))}
        if gated and name in ("exit_head", CHECK_HEAD):
            inputs["blocks_run"] = (INT32, (None,))
        return inputs, {"logits": (FLOAT, (None, spec.vocab_size))}
    hidden = (FLOAT, (None, spec.hidden_size))
    cache = (FLOAT, (None, spec.kv_heads, None, spec.head_dim))
    inputs = {
        "hidden": hidden,
        "last_positions": (INT32, (None,)),
        "total_length": (INT32, ()),
        "past_key": cache,
        "past_value": cache,
        "query_lengths": (INT32, (None,)),
        "unpack": (INT64, (None, None)),
        "pack": (INT64, (None,)),
    }
    if name == "draft":
        inputs["token_ids"] = (INT32, (None,))
    if name.startswith(EXIT_BLOCK):
        inputs["exit"] = (INT32, (None,))
    table = (FLOAT, (None, spec.rotary_dim // 2))
    inputs |= {f"rotary_{name}_table": table for name in spec.rotations}
    return inputs, {"hidden_out": hidden, "key": cache, "value": cache}


def _ports(arguments: Sequence[Any]) -> Ports:
    return {
        each.name: (each.type, tuple(n if isinstance(n, int) else None for n in each.shape))
        for each in arguments
    }
