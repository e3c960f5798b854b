"""A bundle's draft layer against its definition in float64, on states and tokens made up here."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.draft import DraftEngines
from ojfa_export.backends.onnxruntime.portable_draft import PortableDraft
from ojfa_export.backends.passes import Chunk
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.draft_shortcut import DraftShortcut
from ojfa_export.bundle.manifest import DraftEntry
from ojfa_export.bundle.names import DRAFT
from ojfa_export.bundle.onnx_file import read_onnx
from ojfa_export.decoding.arrays import Float32
from ojfa_export.errors import BundleError
from ojfa_export.models.bfloat16 import BFLOAT16, widened
from ojfa_export.models.spec import ModelSpec
from ojfa_export.verify.check import Check
from ojfa_export.verify.tolerances import Comparisons

DTYPES: dict[str, Any] = {"float": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}
# Positions that the model has run, in two pieces, and drafts after them.
FIRST, SECOND, DRAFTED = 9, 4, 3


def verify_draft(bundle: Bundle, drafts: DraftEngines | None) -> list[Check]:
    """Compares a draft layer's graphs, and its engines where there are any, with float64.

    Args:
        bundle: The bundle.
        drafts: The layer as a backend opened it.

    Returns:
        The checks, passed or not; none for a bundle without a draft layer.

    Raises:
        BundleError: The layer is not the one that draft.safetensors holds.
    """
    entry, spec = bundle.manifest.draft, bundle.manifest.model.spec
    if entry is None:
        return []
    shortcut = _read(bundle, entry, spec)
    length = min(FIRST + SECOND, bundle.manifest.cache.max_length - DRAFTED)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(length, len(shortcut.depths) * spec.hidden_size)).astype(np.float32)
    tokens = rng.integers(spec.vocab_size, size=length + DRAFTED).tolist()
    expected = _Reference(bundle, shortcut).logits(states, tokens)
    comparisons = Comparisons(bundle.manifest.precision)
    graphs = PortableDraft(bundle.graphs, shortcut).logits(states, tokens)
    comparisons.record("graph draft: logits", "draft", graphs, expected)
    if drafts is not None:
        found = engine_logits(drafts, states, tokens)
        ids = slice(None) if shortcut.tokens is None else shortcut.tokens
        comparisons.record("float64 draft: logits", "draft", found[:, ids], expected)
    return comparisons.checks()


def _read(bundle: Bundle, entry: DraftEntry, spec: ModelSpec) -> DraftShortcut:
    from ojfa_export.bundle.shortcut_file import load

    shortcut, of_model = load(bundle.path(DRAFT))
    fits = (
        isinstance(shortcut, DraftShortcut)
        and of_model == bundle.manifest.model.sha256
        and (shortcut.depths, shortcut.rope_theta) == (entry.depths, entry.rope_theta)
        and shortcut.spec_within(spec) == entry.spec
        and _ids(shortcut) == (entry.tokens and bundle.integers(entry.tokens).tolist())
    )
    if not fits:
        raise BundleError(
            f"{bundle.directory / DRAFT} is not the draft layer that the manifest describes",
            hint="don't use this bundle: build it again",
        )
    assert isinstance(shortcut, DraftShortcut)
    return shortcut


def _ids(shortcut: DraftShortcut) -> list[int] | None:
    return None if shortcut.tokens is None else shortcut.tokens.tolist()


def engine_logits(drafts: DraftEngines, states: Float32, tokens: list[int]) -> Float32:
    """Logits [1 + DRAFTED, V] after positions in two pieces, and after each draft."""
    width, length = states.shape[1] // len(drafts.depths), len(states)
    executor = drafts.executor(1, length + DRAFTED)
    hidden: Any = None
    for start, stop in ((0, min(FIRST, length - 1)), (min(FIRST, length - 1), length)):
        chunks = [Chunk(0, start, stop - start)]
        for index in range(len(drafts.depths)):
            part = states[start:stop, index * width : (index + 1) * width]
            executor.keep(index, chunks, np.ascontiguousarray(part))
        hidden = executor.begin(tokens[start:stop], chunks)
    found = [drafts.logits(hidden, 0)]
    for at in range(length, length + DRAFTED):
        hidden = executor.go_on(hidden, [tokens[at]], [Chunk(0, at, 1)])
        found.append(drafts.logits(hidden, 0))
    return np.concatenate(found)


class _Reference:
    """The definition, in float64."""

    def __init__(self, bundle: Bundle, shortcut: DraftShortcut) -> None:
        self._shortcut = shortcut
        self._table = _weight(bundle, "embed", "token_embedding")
        self._head = _weight(bundle, "final_head", "head") if shortcut.head is None else None

    def logits(self, states: Float32, tokens: list[int]) -> NDArray[np.float64]:
        shortcut, length = self._shortcut, len(states)
        memory = shortcut.memory(states.astype(np.float64))
        outputs, past = shortcut.apply(memory, self._embed(tokens[:length]))
        found = [outputs[-1]]
        for token in tokens[length:]:
            outputs, past = shortcut.apply(outputs[-1:], self._embed([token]), past)
            found.append(outputs[-1])
        logits: NDArray[np.float64] = shortcut.logits(np.stack(found), self._head)
        return logits

    def _embed(self, tokens: list[int]) -> NDArray[np.float64]:
        return self._table[tokens].astype(np.float64)


def _weight(bundle: Bundle, graph: str, name: str) -> NDArray[Any]:
    """A matrix of the bundle's weights, mapped."""
    tensor = read_onnx((bundle.graphs / f"{graph}.onnx").read_bytes()).tensors[name]
    path = os.fspath(bundle.graphs / tensor.location)
    stored = np.memmap(path, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
    return widened(stored) if stored.dtype == BFLOAT16 else stored
