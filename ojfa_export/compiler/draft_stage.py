"""The stage that gives a build its draft layer: graphs, engines, and the manifest's entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.draft import DraftEngines, DraftLayer, RunsDrafts
from ojfa_export.bundle.draft_shortcut import DraftShortcut, rotations
from ojfa_export.bundle.entries import RotaryTables
from ojfa_export.bundle.manifest import DraftEntry
from ojfa_export.bundle.names import DRAFT, DRAFT_GRAPHS, GRAPHS
from ojfa_export.bundle.shortcut_file import load, save
from ojfa_export.compiler.describe import describe_slice, describe_some
from ojfa_export.compiler.draft_head import with_frequent_head
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.stages import build_engines, engine_files, engine_set, open_engines
from ojfa_export.compiler.work import Work
from ojfa_export.errors import OjfaError
from ojfa_export.graphs.export import DraftTensors, Exporter
from ojfa_export.models import chat_template
from ojfa_export.planning.drafting import PROMPT_TOKENS, PROMPTS, measure_acceptance
from ojfa_export.system.heap import trim_heap
from ojfa_export.system.progress import Progress

KEPT = "draft.json"


def make_draft(inputs: Inputs, work: Work, exporter: Exporter, progress: Progress) -> None:
    """Writes draft.safetensors, graphs and engines, and keeps what the manifest says of them."""
    given, bundle = inputs.given, work.bundle
    assert given.draft is not None
    assert given.draft_path is not None
    draft = with_frequent_head(given.draft, inputs, exporter)
    if draft is given.draft:
        given.copy(given.draft_path, bundle / DRAFT, inputs.model_sha256)
    else:
        save(draft, bundle / DRAFT, inputs.model_sha256)
    entry = _describe(bundle, draft, exporter.draft(draft), exporter)
    build_draft_engines(entry, bundle, inputs.backend, progress)
    entry = described(entry, bundle, inputs.backend)
    entry = entry.model_copy(update={"acceptance": _count_accepted(inputs, work, progress)})
    (work.scratch / KEPT).write_text(entry.model_dump_json(), encoding="utf-8")


def kept_draft(work: Work) -> DraftEntry | None:
    """What `make_draft` kept; None where there is no draft layer."""
    path = work.scratch / KEPT
    if not path.is_file():
        return None
    return DraftEntry.model_validate_json(path.read_text(encoding="utf-8"))


def open_layer(inputs: Inputs, work: Work, engines: Engines) -> DraftEngines | None:
    """Opens the draft layer that was built; None where there is none, or the backend runs none."""
    backend, bundle = inputs.backend, work.bundle
    if inputs.given.draft is None or not isinstance(backend, RunsDrafts):
        return None
    draft, _ = load(bundle / DRAFT)  # with the head that it was given
    assert isinstance(draft, DraftShortcut)
    spec = inputs.checkpoint.spec
    cos, sin = rotations(draft.rope_theta, draft.head_dim, 0, inputs.settings.max_cache_length)
    layer = DraftLayer(
        depths=draft.depths,
        spec=draft.spec_within(spec),
        vocab_size=spec.vocab_size,
        tokens=draft.tokens,
        weights=bundle / GRAPHS,
        engines=engine_files(bundle, backend, list(DRAFT_GRAPHS)),
        rotary=(cos.astype(np.float32), sin.astype(np.float32)),
    )
    return backend.open_draft(engines, layer)


def _count_accepted(inputs: Inputs, work: Work, progress: Progress) -> tuple[float, ...]:
    """How many drafts the model takes in its answers to held-out text."""
    engines = open_engines(inputs, work)
    layer = open_layer(inputs, work, engines)
    if layer is None:
        return ()
    prompts = draft_prompts(inputs)
    spec, length = inputs.checkpoint.spec, inputs.settings.max_cache_length
    accepted = measure_acceptance(spec, engines, layer, prompts, length, progress)
    del layer, engines
    trim_heap()
    return accepted


def draft_prompts(inputs: Inputs) -> list[list[int]]:
    """Token ids of pieces of held-out text from all over it: as a user's words where there is a
    chat template, since answers are what such a model writes.
    """
    held_out = inputs.windows.held_out
    pieces: list[list[int]] = held_out[:: -(-len(held_out) // PROMPTS), :PROMPT_TOKENS].tolist()
    template = inputs.chat.template(with_tools=False) if inputs.chat else None
    if inputs.chat is None or template is None:
        return pieces
    prompts: list[list[int]] = []
    for piece in pieces:
        said = {"role": "user", "content": inputs.tokenizer.decode(piece)}
        try:
            text = chat_template.render(template, [said], inputs.chat.special_tokens)
        except OjfaError:  # it takes other chats
            return pieces
        prompts.append(inputs.tokenizer.encode(text, add_special_tokens=False).ids)
    return prompts


def build_draft_engines(
    entry: DraftEntry, bundle: Path, backend: Backend, progress: Progress
) -> None:
    """Builds a backend's engines of a draft layer, where it runs them."""
    if isinstance(backend, RunsDrafts):
        build_engines(bundle, list(DRAFT_GRAPHS), entry.spec, backend, progress)


def described(entry: DraftEntry, bundle: Path, backend: Backend) -> DraftEntry:
    """The entry with the engines that a backend has built."""
    if not isinstance(backend, RunsDrafts):
        return entry
    others = [each for each in entry.engines if each.backend != backend.name]
    engines = (*others, engine_set(bundle, backend, list(DRAFT_GRAPHS)))
    return entry.model_copy(update={"engines": engines})


def _describe(
    bundle: Path, draft: DraftShortcut, tensors: DraftTensors, exporter: Exporter
) -> DraftEntry:
    return DraftEntry(
        depths=draft.depths,
        spec=draft.spec_within(exporter.checkpoint.spec),
        rope_theta=draft.rope_theta,
        parameters=draft.parameters,
        rotary=RotaryTables(cos=describe_slice(tensors.cos), sin=describe_slice(tensors.sin)),
        tokens=None if tensors.tokens is None else describe_slice(tensors.tokens),
        graphs=describe_some(bundle, DRAFT_GRAPHS),
    )
