"""A bundle's block jump: opening it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.block_jump import BlockJump, open_jump
from ojfa_export.bundle.bundle import Bundle


def open_block_jump(
    bundle: Bundle, backend: Backend, engines: Engines, files: Mapping[str, Path]
) -> None:
    """Gives a bundle's engines the blocks of its block jump, where that is its shortcut.

    Args:
        bundle: The bundle.
        backend: Whose engines; it runs block jumps, see `check_runs_jump`.
        engines: The model's, opened.
        files: Engine files by graph name.
    """
    manifest = bundle.manifest
    exits, blocks, tables = manifest.shortcut.exits, manifest.shortcut.blocks, manifest.rotary
    if exits is None or blocks is None:
        return
    rotary = (bundle.tensor(tables.cos), bundle.tensor(tables.sin)) if tables else None
    spec = manifest.model.spec
    jump = BlockJump(exits, blocks, spec, bundle.graphs, files, rotary, bundle.files)
    open_jump(backend, engines, jump)
