"""Adds a backend's engines to a finished bundle, or rebuilds them: the graphs alone are enough."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ojfa_export import backends
from ojfa_export.backends.backend import Backend
from ojfa_export.backends.block_jump import check_runs_jump
from ojfa_export.backends.checks import check_runs_checks
from ojfa_export.backends.narrow_cache import CacheStorage, with_cache
from ojfa_export.backends.precisions import check_precision
from ojfa_export.backends.quantised import check_runs
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import Manifest, read_manifest
from ojfa_export.bundle.names import ENGINES, MANIFEST
from ojfa_export.compiler.check_stage import build_check_engine, checked_by
from ojfa_export.compiler.describe import describe_files
from ojfa_export.compiler.draft_stage import build_draft_engines, described
from ojfa_export.compiler.stages import build_engines, engine_set
from ojfa_export.compiler.versions import tool_versions
from ojfa_export.compiler.work import Work
from ojfa_export.errors import BundleError, OjfaError, VerificationError
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import Progress
from ojfa_export.verify.outcome import raise_failed
from ojfa_export.verify.verify import compare_blocks


def add_engines(
    bundle: Path,
    backend_name: str,
    progress: Progress,
    *,
    cache: CacheStorage | None = None,
    skip_verification: bool = False,
) -> dict[str, Any]:
    """Builds engines beside the bundle, then puts them and a new manifest in its place.

    What was built is kept in BUNDLE.BACKEND.partial until the bundle is whole: an interrupted
    build goes on there.

    Args:
        bundle: A bundle directory.
        backend_name: Engines to build.
        progress: Shows engines.
        cache: What they keep keys and values in; None for what products are computed in.
        skip_verification: Whether to leave out the comparison with float64.

    Raises:
        OjfaError: The bundle is damaged, the backend can't build its graphs, or the engines don't
            compute what the bundle's weights say; the bundle is as it was.
    """
    opened = Bundle(bundle)
    directory = bundle.resolve()
    manifest = opened.manifest
    backend = with_cache(backends.load(backend_name), cache, manifest.precision)
    check_runs(backend, manifest.weights, manifest.precision)
    check_precision(backend, manifest.precision)
    check_runs_checks(backend, manifest.check.size if manifest.check else 0)
    check_runs_jump(backend, manifest.shortcut.exits)
    names = manifest.graph_names
    checks = []
    with Work(directory, _fingerprint(opened, backend), f".{backend.name}.partial").open() as work:
        with work.stage("copy") as needed:
            if needed:
                _link(directory, work.bundle, backend)
        with work.stage("engines") as needed:
            if needed:
                build_engines(work.bundle, names, manifest.model.spec, backend, progress)
                if manifest.draft is not None:
                    build_draft_engines(manifest.draft, work.bundle, backend, progress)
                if manifest.check is not None:
                    spec = manifest.model.spec
                    build_check_engine(manifest.check, work.bundle, spec, backend, progress)
        others = [each for each in manifest.engines if each.backend != backend.name]
        engines = (*others, engine_set(work.bundle, backend, names))
        (work.bundle / MANIFEST).unlink(missing_ok=True)
        files = describe_files(work.bundle)
        draft = manifest.draft and described(manifest.draft, work.bundle, backend)
        check = manifest.check and checked_by(manifest.check, work.bundle, backend)
        changed = manifest.model_copy(
            update={"engines": engines, "files": files, "draft": draft, "check": check}
        )
        (work.bundle / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
        if not skip_verification:
            fresh = Bundle(work.bundle)
            checks = compare_blocks(fresh, Model(fresh, backend.name), backend.name, progress)
            try:
                raise_failed(checks, "float64 on the bundle's weights", manifest.precision, backend)
            except VerificationError:
                shutil.rmtree(work.directory)  # these engines are of no use
                raise
        if not _holds(directory, manifest):
            raise OjfaError(
                f"{bundle} was replaced or removed while engines were added to it",
                hint="run the same command again",
            )
        work.publish()
    return {
        "bundle": str(bundle),
        "backend": backend.name,
        "engines": len(names),
        "checks": len(checks),
    }


def _holds(directory: Path, manifest: Manifest) -> bool:
    """Whether a directory still holds the bundle of that manifest."""
    try:
        return read_manifest(directory) == manifest
    except BundleError:
        return False


def _fingerprint(bundle: Bundle, backend: Backend) -> str:
    """Digest of everything that decides the result."""
    parts = [bundle.manifest.model_dump(mode="json"), backend.versions(), tool_versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _link(source: Path, target: Path, backend: Backend) -> None:
    """Hard links to all of a bundle but what will be new: nothing large is copied."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        if Path(folder) == source / ENGINES:
            return {backend.name} & set(names)
        return {MANIFEST} & set(names) if Path(folder) == source else set()

    # What an interrupted run had begun goes; the directory stays, as work is known by its inode.
    for path in target.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(source, target, copy_function=os.link, ignore=left_out, dirs_exist_ok=True)
