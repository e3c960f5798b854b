"""`ojfa-export inspect`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ojfa_export.bundle.names import CHAT, STATISTICS
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.readable import readable_bytes

if TYPE_CHECKING:
    from ojfa_export.bundle.bundle import Bundle
    from ojfa_export.bundle.entries import GraphEntry, Port
    from ojfa_export.bundle.manifest import DraftEntry, Manifest
    from ojfa_export.bundle.shortcut_entry import ShortcutEntry
    from ojfa_export.models.spec import ModelSpec


@define("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
def command(console: Console, bundle: Path) -> None:
    """Show what is in BUNDLE.

    Model, graphs, sizes, engines, calibration and provenance; every file is checked first. With
    -v, every graph by itself, every file, and the layers of TensorRT's engines. With --json, the
    manifest and the sizes.
    """
    from ojfa_export.bundle.bundle import Bundle

    opened = Bundle(bundle)
    sizes = measure_sizes(opened)
    quantised = measure_quantised(opened)
    if console.json:
        manifest = json.loads(opened.manifest.to_json())
        if opened.manifest.weights is not None:
            sizes["quantised"] = quantised
        console.emit({"bundle": str(bundle), **manifest, "sizes": sizes})
        return
    _show_model(console, opened.manifest)
    _show_graphs(console, opened.manifest)
    shown = {kind: readable_bytes(size) for kind, size in sizes.items()}
    if opened.manifest.weights is not None:
        shown["weights"] += f", of which quantised {readable_bytes(quantised)}"
    _section(console, "Sizes", shown)
    _show_origin(console, opened.manifest)
    if console.verbosity > 0:
        _show_layers(console, opened)
        _show_files(console, opened.manifest)


def measure_sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of each kind of file, and of all."""
    from ojfa_export.bundle.names import ENGINES, MANIFEST, REPORT

    manifest = bundle.manifest
    draft = manifest.draft
    entries = manifest.all_graphs
    weights = {name for graph in entries for name in graph.weights}
    if draft is not None and draft.tokens is not None:
        weights.add(draft.tokens.file)
    if manifest.check is not None:
        weights.add(manifest.check.tokens.file)
    if manifest.rotary is not None:
        weights |= {manifest.rotary.cos.file, manifest.rotary.sin.file}
    graphs = {graph.file for graph in entries}
    sizes = {"weights": 0, "graphs": 0, "engines": 0, "report": 0, "other": 0}
    for name, entry in manifest.files.items():
        if name in weights:
            kind = "weights"
        elif name in graphs:
            kind = "graphs"
        else:
            folder = name.partition("/")[0]
            kind = folder if folder in (ENGINES, REPORT) else "other"
        sizes[kind] += entry.size
    sizes["other"] += (bundle.directory / MANIFEST).stat().st_size
    return {"total": sum(sizes.values()), **sizes}


def measure_quantised(bundle: Bundle) -> int:
    """Bytes of numbers, scales and zero points of quantised matrices."""
    from ojfa_export.bundle.onnx_file import read_onnx
    from ojfa_export.bundle.weight_format import ENDS

    found: dict[tuple[str, int], int] = {}  # heads may share a matrix
    for graph in bundle.manifest.graphs:
        for name, tensor in read_onnx(bundle.read(graph.file)).tensors.items():
            if name.endswith(ENDS):
                found[tensor.location, tensor.offset] = tensor.length
    return sum(found.values())


def _section(console: Console, title: str, facts: dict[str, object] | dict[str, str]) -> None:
    console.print()
    console.heading(title)
    console.facts(facts)


def _show_model(console: Console, manifest: Manifest) -> None:
    model, spec, shortcut, cache = (
        manifest.model,
        manifest.model.spec,
        manifest.shortcut,
        manifest.cache,
    )
    stored = "" if manifest.weights is None else f", weights {manifest.weights.storage}"
    precision = f"{manifest.precision}{stored}"
    console.heading(f"{model.name}: {spec.family}, {spec.blocks} blocks, {precision}")
    console.facts(
        {
            "revision": model.revision,
            "ignored fields": ", ".join(model.ignored_fields),
            "digest": model.sha256,
            "exits": f"{_describe_exits(shortcut, spec.blocks)} by the shortcut, "
            f"{spec.blocks} by the full head",
            "hidden size": spec.hidden_size,
            "attention": f"{spec.heads} heads, {spec.kv_heads} of keys and values, "
            f"{spec.head_dim} features each{_describe_window(spec)}"
            + ("" if spec.attention_softcap is None else f", softcap {spec.attention_softcap:g}"),
            "positions": _describe_positions(spec),
            "MLP": f"{spec.intermediate_size} features, {spec.activation}"
            + (", gated" if spec.gated else "")
            + (", beside attention" if spec.parallel else ""),
            "norm": _describe_norms(spec),
            "vocabulary": f"{spec.vocab_size}"
            + (", tied to the head" if spec.tied_head else "")
            + ("" if spec.logit_softcap is None else f", logits' softcap {spec.logit_softcap:g}"),
            "chat": "by the checkpoint's template (run --chat)" if CHAT in manifest.files else "",
            "cache": f"{cache.max_length} tokens, {cache.max_batch_size} sequences, "
            f"axes {', '.join(cache.axes)}",
            "shortcut": _describe(shortcut),
            "draft layer": "" if manifest.draft is None else _describe_draft(manifest.draft),
            "exits are checked by": "" if manifest.check is None else manifest.check.reason,
            "gates": ", ".join(f"{gate:.2f}" for gate in shortcut.gates or ()),
            **_describe_weights(manifest),
        }
    )


def _describe_weights(manifest: Manifest) -> dict[str, str]:
    """What is quantised, and what is kept wider."""
    from ojfa_export.models.families.config import QUANTISATION

    form, spec = manifest.weights, manifest.model.spec
    stored = (manifest.model.config.get(QUANTISATION) or {}).get("quant_method", "")
    if form is None:
        if not stored:
            return {}
        return {"weights": f"{manifest.precision}, exactly what the checkpoint's ({stored}) are"}
    # A low-rank jump folded with the head has a matrix of its own to the vocabulary.
    shortcut = manifest.shortcut
    folded = not shortcut.residual and shortcut.width is None
    quantised = "the blocks' attention.qkv, attention.out, mlp.up, mlp.down"
    if form.head:
        quantised += ", and the head"
    if folded and form.head and not stored and manifest.precision == "fp32":
        quantised += "; the exit head's matrix where its rank is whole groups"
    tied = ", with which the head was tied" if spec.tied_head and form.head else ""
    head = "" if form.head else ", heads"
    kept = f"{manifest.precision}: embeddings{tied}{head}; norms, biases and the shortcut"
    if blocks := [name for name in form.wide if not name.startswith("final_head")]:
        kept += f"; {', '.join(blocks)}"
    made = f" as the checkpoint ({stored}) has them" if stored else ""
    return {"weights": f"{form}{made}: {quantised}", "kept wider": kept}


def _describe_window(spec: ModelSpec) -> str:
    if spec.window is None:
        return ""
    some = f" in {sum(spec.windowed)} blocks" if spec.windowed else ""
    return f", window {spec.window}{some}"


def _describe_positions(spec: ModelSpec) -> str:
    if spec.learned_positions:
        return "learned"
    some = f" in {sum(spec.rotated)} blocks" if spec.rotated else ""
    if spec.rotated_second:
        some = f", otherwise in {sum(spec.rotated_second)} blocks"
    return f"{spec.rotary_dim} rotated features{some}"


def _describe_norms(spec: ModelSpec) -> str:
    places = {"before": "", "after": ", after", "both": ", before and after"}
    place = f"{places[spec.norms]} attention and MLP" if places[spec.norms] else ""
    of_heads = {"none": "", "head": "each head", "projection": "all heads"}[spec.qk_norm]
    more = f", also of {of_heads} of queries and of keys" if of_heads else ""
    return f"{spec.norm}, epsilon {spec.norm_epsilon:g}{place}{more}"


def _describe_exits(shortcut: ShortcutEntry, blocks: int) -> str:
    if shortcut.exits is None:
        return f"1 to {blocks - 1}"
    return ", ".join(map(str, shortcut.exits))


def _describe(shortcut: ShortcutEntry) -> str:
    size = f"{shortcut.parameters:,} parameters"
    if shortcut.width is not None:
        return f"one MLP for all exits, {shortcut.width} features, {size}"
    if shortcut.blocks is not None:
        behind = "one block for all exits" if shortcut.blocks == 1 else "a block for each exit"
        return f"{behind}, with keys and values of its own, {size}"
    fitted = "" if shortcut.gates else f"fitted after block {shortcut.fitted_at}, "
    added = ", residual" if shortcut.residual and shortcut.kind != "residual" else ""
    return f"{shortcut.kind}, rank {shortcut.rank}, {fitted}{size}{added}"


def _describe_draft(draft: DraftEntry) -> str:
    spec, seen = draft.spec, ", ".join(map(str, draft.depths))
    tokens = "all tokens" if draft.tokens is None else f"{spec.vocab_size} tokens"
    backends = ", ".join(each.backend for each in draft.engines) or "no backend"
    return (
        f"drafts {tokens} as exit 0, {spec.heads} heads, {spec.intermediate_size} features, "
        f"sees states after {seen} blocks, {draft.parameters:,} parameters, runs on {backends}"
    )


def _show_graphs(console: Console, manifest: Manifest) -> None:
    console.print()
    console.heading(f"Graphs, opset {manifest.opset}")
    entries = manifest.all_graphs
    for graphs in _alike(entries) if console.verbosity < 1 else [[g] for g in entries]:
        first, last = graphs[0], graphs[-1]
        several = f" to {last.name} ({len(graphs)} alike)" if len(graphs) > 1 else ""
        about = f": {first.description}" if first.description and not several else ""
        console.print(f"{first.name}{several}{about}")
        for direction, ports in (("in ", first.inputs), ("out", first.outputs)):
            for port in ports:
                console.print(f"  {direction} {_describe_port(port)}")


def _alike(graphs: tuple[GraphEntry, ...]) -> list[list[GraphEntry]]:
    """Groups neighbours of one name but for the number, and of the same inputs and outputs."""

    def kind(graph: GraphEntry) -> tuple[object, ...]:
        return graph.name.rstrip("0123456789"), graph.inputs, graph.outputs

    return [list(group) for _, group in itertools.groupby(graphs, kind)]


def _describe_port(port: Port) -> str:
    return f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]"


def _show_origin(console: Console, manifest: Manifest) -> None:
    from ojfa_export.compiler.decided import why_not_planned

    calibration, built = manifest.calibration, manifest.built
    engines: dict[str, object] = {
        each.backend: f"{len(each.files)} engines, built with "
        + ", ".join(f"{name} {version}" for name, version in each.built_with.items())
        for each in manifest.engines
    }
    _section(console, "Engines", engines)
    _section(
        console,
        "Calibration",
        {
            "text": ", ".join(
                f"{each.name} ({each.bytes:,} bytes)" for each in calibration.sources
            ),
            "tokens": (f"{calibration.tokens_fit:,} to fit on, " if calibration.tokens_fit else "")
            + f"{calibration.tokens_held_out:,} held out",
            "exit auto": manifest.promise.reason if manifest.promise else "",
            **_evidence(manifest),
            "default": manifest.default.reason
            if manifest.default
            else why_not_planned(manifest.model.spec, STATISTICS in manifest.files),
        },
    )
    own = manifest.generation
    _section(
        console,
        "Generation",
        {
            "end of text": ", ".join(map(str, manifest.model.spec.eos_token_ids)) or "none",
            "greedy and sampled": own.always,
            "sampled": own.sampling,
        },
    )
    _section(
        console,
        "Provenance",
        {
            "built": f"{built.time:%Y-%m-%d %H:%M:%S %Z} on {built.host}",
            "versions": ", ".join(f"{name} {version}" for name, version in built.versions.items()),
            "golden": ", ".join(
                f"{len(each.token_ids)} tokens at exit {each.exit}" for each in manifest.golden
            ),
        },
    )


def _evidence(manifest: Manifest) -> dict[str, object]:
    """What the promise was made on, by domain."""
    domains = () if manifest.promise is None else manifest.promise.domains
    return {
        f"promise on {each.name}": f"{each.disagreement:.1%} of {each.tokens:,} tokens differ, "
        f"from {each.windows} windows of {each.text or each.made_on}"
        for each in domains
    }


def _show_layers(console: Console, bundle: Bundle) -> None:
    """What a backend's compiler made of the graphs, where that can be looked at here."""
    from ojfa_export import backends
    from ojfa_export.backends.backend import ShowsLayers
    from ojfa_export.errors import OjfaError

    for engines in bundle.manifest.engines:
        try:
            backend = backends.load(engines.backend)
            if not isinstance(backend, ShowsLayers):
                continue
            backend.check(engines.built_with)
            files = {name: bundle.path(file) for name, file in engines.files.items()}
            layers = backend.describe_layers(files)
        except OjfaError as error:
            _section(console, f"Layers of {engines.backend}", {"not shown": error.message})
            continue
        for name, text in layers.items():
            console.print()
            console.heading(f"Layers of {name}")
            console.print(text)


def _show_files(console: Console, manifest: Manifest) -> None:
    console.print()
    console.heading("Files")
    console.table(
        ("bytes", "sha256", "file"),
        [(str(entry.size), entry.sha256, name) for name, entry in sorted(manifest.files.items())],
    )
