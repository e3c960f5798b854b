"""A whole bundle of a published shape, with random weights and TensorRT engines for this GPU.

Each block has a file of its own, so that loading reads from the disk what a real model's loading
reads.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

from bench.gpu.shapes import PRECISION, SHAPES, RandomGraphs
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.bundle.entries import FileEntry
from ojfa_export.bundle.manifest import Built, CacheLayout, Calibration, Manifest, Model
from ojfa_export.bundle.names import MANIFEST, graph_names
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.compiler.describe import describe_rotary, describe_some
from ojfa_export.compiler.stages import engine_set
from ojfa_export.compiler.versions import tool_versions
from ojfa_export.graphs.graph import OPSET
from ojfa_export.system.digest import sha256_file

TOKENIZER = Path(__file__).parents[2] / "calibration/demo/checkpoint/tokenizer.json"


def write_bundle(name: str, bundle: Path, max_length: int) -> None:
    """Writes a bundle of a shape of `bench.gpu.shapes`, if it isn't there.

    Args:
        name: Of the shape.
        bundle: Directory to make.
        max_length: Tokens that a sequence may hold.
    """
    if (bundle / MANIFEST).exists():
        return
    shutil.rmtree(bundle, ignore_errors=True)
    spec = SHAPES[name]
    RandomGraphs(spec, bundle / "graphs", max_length).write()
    for path in sorted((bundle / "graphs").glob("block_*.bin"))[1:]:
        shutil.copyfile(path, path.with_suffix(".copy"))  # it is a hard link to the first one
        path.with_suffix(".copy").rename(path)
    engines = bundle / "engines" / BACKEND.name
    engines.mkdir(parents=True)
    names = graph_names(spec.blocks)
    for graph in names:
        BACKEND.build_engine(spec, bundle / "graphs" / f"{graph}.onnx", engines / f"{graph}.json")
    shutil.copyfile(TOKENIZER, bundle / TOKENIZER.name)
    (bundle / "shortcut.safetensors").write_bytes(b"")  # the heads' graphs hold it already
    rank = spec.hidden_size // 100
    manifest = Manifest(
        model=Model(
            name=name,
            revision=None,
            sha256=hashlib.sha256(name.encode()).hexdigest(),
            config={},
            spec=spec,
        ),
        precision=PRECISION,
        opset=OPSET,
        cache=CacheLayout(max_length=max_length, max_batch_size=16),
        rotary=describe_rotary(bundle),
        graphs=describe_some(bundle, names),
        engines=(engine_set(bundle, BACKEND, names),),
        shortcut=ShortcutEntry(
            kind="ojfa",
            rank=rank,
            fitted_at=1,
            residual=False,
            parameters=2 * rank * spec.hidden_size,
        ),
        calibration=Calibration(sources=(), tokens_fit=1, tokens_held_out=1),
        golden=(),
        files=_describe_files(bundle),
        built=Built(
            time=datetime.now(timezone.utc), host=platform.node(), versions=tool_versions()
        ),
    )
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _describe_files(bundle: Path) -> dict[str, FileEntry]:
    paths = sorted(path for path in bundle.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(sha256_file, paths))
    return {
        path.relative_to(bundle).as_posix(): FileEntry(size=path.stat().st_size, sha256=digest)
        for path, digest in zip(paths, digests, strict=True)
    }
