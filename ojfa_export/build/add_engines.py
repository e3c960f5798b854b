"""Adds a backend's engines to a finished bundle, or rebuilds them: the graphs alone are enough."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ojfa_export import backends
from ojfa_export.build.describe import describe_files
from ojfa_export.build.stages import build_engines, engine_set
from ojfa_export.build.work import flush
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import ENGINES, MANIFEST, graph_names
from ojfa_export.progress import Progress


def add_engines(bundle: Path, backend_name: str, progress: Progress) -> dict[str, Any]:
    """Builds engines beside the bundle, then puts them and a new manifest in its place.

    Args:
        bundle: A bundle directory.
        backend_name: Engines to build.
        progress: Shows engines.

    Raises:
        OjfaError: The bundle is damaged, or the backend can't build its graphs.
    """
    opened = Bundle(bundle)
    directory = bundle.resolve()
    backend, manifest = backends.load(backend_name), opened.manifest
    names = graph_names(manifest.model.spec.blocks)
    # Not BUNDLE.partial, where a build of the bundle may be waiting to be resumed.
    with tempfile.TemporaryDirectory(
        dir=directory.parent, prefix=f"{directory.name}.", suffix=".partial"
    ) as temporary:
        fresh, old = Path(temporary) / "fresh", Path(temporary) / "old"
        # Weights are hard links: nothing large is copied.
        shutil.copytree(directory, fresh, copy_function=os.link)
        (fresh / MANIFEST).unlink()
        shutil.rmtree(fresh / ENGINES / backend.name, ignore_errors=True)
        build_engines(fresh, names, manifest.model.spec, backend, progress)
        others = [each for each in manifest.engines if each.backend != backend.name]
        engines = (*others, engine_set(fresh, backend, names))
        changed = manifest.model_copy(update={"engines": engines, "files": describe_files(fresh)})
        (fresh / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
        flush(fresh)
        directory.rename(old)
        try:
            fresh.rename(directory)
        except BaseException:
            old.rename(directory)
            raise
    return {"bundle": str(bundle), "backend": backend.name, "engines": len(names)}
