"""Which inputs, outputs and weights the portable graphs of a model have, by its sizes."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.bundle.manifest import DraftEntry, Manifest
from ojfa_export.bundle.names import CHECK_HEAD, DRAFT_GRAPHS, EXIT_BLOCK, OF_EXITS
from ojfa_export.bundle.weight_format import BLOCK_MATRICES, ORDER, WeightFormat
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# By name: data type and shape.
Ports = Mapping[str, tuple[str, tuple[int | str, ...]]]
# By name: shape, and whether every model has it.
WeightShapes = Mapping[str, tuple[tuple[int, ...], bool]]

TOKENS: tuple[str, str] = ("batch", "tokens")
COMPUTED: Mapping[Precision, str] = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}


def expected_ports(manifest: Manifest, graph: str) -> tuple[Ports, Ports]:
    """Inputs and outputs of a portable graph; see its emitter in `graphs`."""
    spec = manifest.model.spec
    if graph in DRAFT_GRAPHS and manifest.draft is not None:
        return _draft_ports(manifest.draft, graph, _compute(manifest))
    if graph == "embed":
        return _embed_ports(spec)
    if graph in ("exit_head", CHECK_HEAD, "final_head"):
        inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {
            "hidden": ("float", ("rows", spec.hidden_size))
        }
        if graph != "final_head" and manifest.shortcut.residual:
            inputs["blocks_run"] = ("int32", ("rows",))
        return inputs, {"logits": ("float", ("rows", _logits_of(manifest, graph).vocab_size))}
    of_block, outputs = _block_ports(spec, _compute(manifest))
    if graph.startswith(EXIT_BLOCK):
        of_block = {**of_block, "exit": ("int32", TOKENS)}
    return of_block, outputs


def _logits_of(manifest: Manifest, head: str) -> ModelSpec:
    """The model, of the tokens that a head's logits are of."""
    spec, check = manifest.model.spec, manifest.check
    if head == CHECK_HEAD and check is not None:
        return spec.with_vocabulary(check.size)
    return spec


def _compute(manifest: Manifest) -> str:
    return COMPUTED[manifest.precision]


def _embed_ports(spec: ModelSpec) -> tuple[Ports, Ports]:
    inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "token_ids": ("int32", TOKENS),
        "positions": ("int32", TOKENS),
    }
    if spec.rotary_switch is not None:
        inputs["long_context"] = ("int32", ())
    return inputs, {"hidden": ("float", (*TOKENS, spec.hidden_size)), **_rotations(spec)}


def _block_ports(spec: ModelSpec, precision: str) -> tuple[Ports, Ports]:
    past = (precision, ("batch", spec.kv_heads, "past", spec.head_dim))
    new = (precision, ("batch", spec.kv_heads, "tokens", spec.head_dim))
    hidden = ("float", (*TOKENS, spec.hidden_size))
    return {
        "hidden": hidden,
        "positions": ("int32", TOKENS),
        "past_key": past,
        "past_value": past,
        **_rotations(spec),
    }, {"hidden_out": hidden, "key": new, "value": new}


def _draft_ports(draft: DraftEntry, graph: str, precision: str) -> tuple[Ports, Ports]:
    spec, rows = draft.spec, "rows"
    hidden = ("float", (rows, spec.hidden_size))
    if graph == "draft_memory":
        width = len(draft.depths) * spec.hidden_size
        return {"states": ("float", (rows, width))}, {"memory": hidden}
    if graph == "draft_head":
        return {"hidden": hidden}, {"logits": ("float", (rows, spec.vocab_size))}
    inputs, outputs = _block_ports(spec, precision)
    return {**inputs, "token_ids": ("int32", TOKENS)}, outputs


def _rotations(spec: ModelSpec) -> Ports:
    port = ("float", (*TOKENS, spec.rotary_dim // 2))
    return {f"rotary_{name}": port for name in spec.rotations}


def expected_weights(
    manifest: Manifest, graph: str, found: Mapping[str, tuple[int, ...]]
) -> WeightShapes:
    """Weights of a portable graph; it has no others.

    Args:
        manifest: Of the bundle.
        graph: Its name.
        found: Shapes of the weights that it has.
    """
    plain = _plain_weights(manifest, graph, found)
    if manifest.weights is None:
        return plain
    return _stored(manifest.weights, graph, plain, found)


def _stored(
    form: WeightFormat, graph: str, plain: WeightShapes, found: Mapping[str, tuple[int, ...]]
) -> WeightShapes:
    """Weights of a graph with the tensors of quantised matrices in place of these."""
    stored: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, (shape, required) in plain.items():
        # An MLP for exits stays as it is.
        if name in BLOCK_MATRICES and not set(found) & OF_EXITS and form.stores(graph, name):
            inputs, outputs = shape
        elif (name == "head" and form.head) or (name == "vocabulary" and name not in found):
            outputs, inputs = shape
        else:
            stored[name] = (shape, required)
            continue
        parts = form.shapes(inputs, outputs)
        stored |= {name + end: (each, required) for end, each in parts.items()}
        stored[name + ORDER] = ((inputs,), False)
    return stored


def _plain_weights(
    manifest: Manifest, graph: str, found: Mapping[str, tuple[int, ...]]
) -> WeightShapes:
    """Weights as they are where none is quantised."""
    spec = manifest.model.spec
    if graph in DRAFT_GRAPHS and manifest.draft is not None:
        return _draft_weights(manifest.draft, graph, spec.vocab_size)
    if graph == "embed":
        return _embed_weights(manifest)
    if graph == "final_head":
        return _final_weights(spec)
    if graph in ("exit_head", CHECK_HEAD):
        spec = _logits_of(manifest, graph)
        if manifest.shortcut.blocks is not None:
            return _final_weights(spec)
        if manifest.shortcut.width is not None:
            return _mlp_weights(spec, manifest.shortcut.width)
        if manifest.shortcut.residual:
            rank = manifest.shortcut.low_rank
        else:  # folded with the final norm, whose rank may be one more
            rank = found["project"][-1] if found.get("project") else 0
        return _exit_weights(spec, rank, residual=manifest.shortcut.residual)
    weights = _block_weights(spec, spec.hidden_size)
    if graph.startswith(EXIT_BLOCK):
        each = (len(manifest.shortcut.exits or ()), spec.hidden_size)
        return {**weights, "exit.scale": (each, True), "exit.shift": (each, True)}
    return weights


def _block_weights(spec: ModelSpec, seen: int) -> WeightShapes:
    """Of a block whose attention sees so many features."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    inner, hidden = spec.intermediate_size, spec.hidden_size
    sandwich = ("attention.after_norm", "mlp.after_norm") if spec.norms == "both" else ()
    return {
        **{name: each for norm in sandwich for name, each in _norm(spec, norm).items()},
        **_norm(spec, "attention.norm"),
        **_linear("attention.qkv", seen, queries + 2 * keys),
        **{
            f"attention.{name}.weight": ((features,), True)
            for name, features in zip(("q_norm", "k_norm"), spec.qk_norm_features, strict=True)
            if features
        },
        **_linear("attention.out", queries, hidden),
        **_norm(spec, "mlp.norm"),
        **_linear("mlp.up", hidden, 2 * inner if spec.gated else inner),
        **_linear("mlp.down", inner, hidden),
    }


def _draft_weights(draft: DraftEntry, graph: str, vocab_size: int) -> WeightShapes:
    spec, hidden = draft.spec, draft.spec.hidden_size
    if graph == "draft_memory":
        return {"fuse.weight": ((len(draft.depths) * hidden, hidden), True)}
    if graph == "draft_head":
        return _final_weights(spec)
    return {
        "token_embedding": ((vocab_size, hidden), True),
        **_norm(spec, "embedding.norm"),
        **_block_weights(spec, 2 * hidden),
    }


def _embed_weights(manifest: Manifest) -> WeightShapes:
    spec = manifest.model.spec
    weights: dict[str, tuple[tuple[int, ...], bool]] = {
        "token_embedding": ((spec.vocab_size, spec.hidden_size), True)
    }
    if spec.learned_positions:
        weights["position_embedding"] = ((spec.max_positions, spec.hidden_size), True)
    elif manifest.rotary is not None:
        weights["rotary_cos_table"] = (manifest.rotary.cos.shape, True)
        weights["rotary_sin_table"] = (manifest.rotary.sin.shape, True)
    return weights


def _final_weights(spec: ModelSpec) -> WeightShapes:
    return {**_norm(spec, "final_norm"), "head": ((spec.vocab_size, spec.hidden_size), True)}


def _exit_weights(spec: ModelSpec, rank: int, *, residual: bool) -> WeightShapes:
    weights: dict[str, tuple[tuple[int, ...], bool]] = {
        "project": ((spec.hidden_size, rank), True),
        "project.bias": ((rank,), True),
    }
    if residual:
        weights["up"] = ((rank, spec.hidden_size), True)
        weights["gates"] = ((spec.blocks - 1,), True)
        return {**weights, **_final_weights(spec)}
    weights["vocabulary"] = ((spec.vocab_size, rank), True)
    weights["vocabulary.bias"] = ((spec.vocab_size,), False)
    return weights


def _mlp_weights(spec: ModelSpec, width: int) -> WeightShapes:
    exits, columns = spec.blocks - 1, 2 * width if spec.gated else width
    return {
        "exit.scale": ((exits, spec.hidden_size), True),
        "exit.bias": ((exits, columns), True),
        "mlp.up.weight": ((spec.hidden_size, columns), True),
        "mlp.down.weight": ((width, spec.hidden_size), True),
        **_final_weights(spec),
    }


def _norm(spec: ModelSpec, name: str) -> WeightShapes:
    shape = (spec.hidden_size,)
    kinds = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{name}.{kind}": (shape, True) for kind in kinds}


def _linear(name: str, inputs: int, outputs: int) -> WeightShapes:
    return {f"{name}.weight": ((inputs, outputs), True), f"{name}.bias": ((outputs,), False)}
