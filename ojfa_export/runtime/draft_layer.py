"""A bundle's draft layer: opening it, and what a draft of it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.draft import DraftEngines, DraftLayer, RunsDrafts, no_drafts
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Manifest
from ojfa_export.bundle.names import MANIFEST
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.errors import BundleError, UsageError
from ojfa_export.models.spec import ModelSpec


def open_draft(bundle: Bundle, backend: Backend, engines: Engines) -> DraftEngines | None:
    """Opens a bundle's draft layer; None where it has none, or no engines of it for the backend.

    Args:
        bundle: The bundle.
        backend: Whose engines.
        engines: The model's, opened.

    Raises:
        BundleError: Its tokens are none of the model's.
    """
    entry = bundle.manifest.draft
    if entry is None or not isinstance(backend, RunsDrafts):
        return None
    built = next((each for each in entry.engines if each.backend == backend.name), None)
    if built is None:
        return None
    backend.check(built.built_with)
    tokens = None if entry.tokens is None else bundle.integers(entry.tokens)
    vocab_size = bundle.manifest.model.spec.vocab_size
    if tokens is not None:
        inside = 0 <= int(tokens[0]) <= int(tokens[-1]) < vocab_size
        if not inside or not (np.diff(tokens) > 0).all():
            raise BundleError(
                f"{bundle.directory / MANIFEST}: the draft layer's tokens are none of the model's",
                hint="don't use this bundle: build it again",
            )
    directory = bundle.files.directory
    layer = DraftLayer(
        depths=entry.depths,
        spec=entry.spec,
        vocab_size=vocab_size,
        tokens=tokens,
        weights=bundle.graphs,
        engines={name: directory / file for name, file in built.files.items()},
        rotary=(bundle.tensor(entry.rotary.cos), bundle.tensor(entry.rotary.sin)),
        files=bundle.files,
    )
    return backend.open_draft(engines, layer)


def needs_draft(bundle: Bundle, backend: Backend, drafts: DraftEngines | None) -> DraftEngines:
    """The draft layer that was asked for.

    Raises:
        BackendError: The backend doesn't run it.
        UsageError: There is none.
    """
    if drafts is not None:
        return drafts
    if bundle.manifest.draft is not None:
        raise no_drafts(backend)
    raise UsageError(
        f"{bundle.directory} has no draft layer",
        hint="build it with --shortcut and the file of a draft layer",
    )


def with_exit(speculation: Speculation, manifest: Manifest, *, has_layer: bool) -> Speculation:
    """The same with an exit, and with what a draft costs where a draft layer drafts.

    Raises:
        UsageError: An exit that can't draft.
    """
    exit = speculation.resolve_exit(
        manifest.model.spec.blocks, has_layer=has_layer, served=manifest.shortcut.exits
    )
    cost = speculation.draft_cost
    if exit == 0 and cost is None:
        cost = draft_share(manifest)
    return replace(speculation, exit=exit, draft_cost=cost)


def draft_share(manifest: Manifest) -> float:
    """What a draft costs of a full step, by the weights that both read: 0 without a draft layer.

    A step of the layer reads its block and its head; the states of positions that the model has
    run are fused once a round, beside the block.
    """
    draft = manifest.draft
    if draft is None:
        return 0.0
    spec = manifest.model.spec
    own = _block(draft.spec, 2 * spec.hidden_size) + draft.spec.vocab_size * spec.hidden_size
    full = spec.blocks * _block(spec, spec.hidden_size) + spec.vocab_size * spec.hidden_size
    return own / full


def _block(spec: ModelSpec, seen: int) -> int:
    """Weights of a block's matrices, whose attention sees so many features."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = seen * (queries + 2 * keys) + queries * spec.hidden_size
    return attention + spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
