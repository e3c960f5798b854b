"""The stages of a build, each from files to files."""

from __future__ import annotations

import itertools
import json
import platform
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer

from ojfa_export.backends.backend import Backend, Engines, SharesEngines
from ojfa_export.backends.block_jump import BlockJump, open_jump
from ojfa_export.backends.frugal import frugal
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.check_entry import CheckEntry
from ojfa_export.bundle.entries import EngineSet
from ojfa_export.bundle.manifest import (
    Built,
    CacheLayout,
    Calibration,
    CalibrationSource,
    DraftEntry,
    Golden,
    Manifest,
    Model,
)
from ojfa_export.bundle.names import (
    CHAT,
    CHECK_HEAD,
    ENGINES,
    GRAPHS,
    MANIFEST,
    SHORTCUT,
    TOKENIZER,
)
from ojfa_export.bundle.promise import Promise
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.bundle.shortcut_file import load_exit
from ojfa_export.bundle.weight_format import (
    QuantisedMatrix,
    WeightFormat,
    dequantise,
    matrix_of,
)
from ojfa_export.compiler.decided import Decided
from ojfa_export.compiler.describe import describe_files, describe_rotary, describe_some
from ojfa_export.compiler.golden import make_golden
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.compiler.versions import tool_versions
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.arrays import Float32
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.graph import OPSET
from ojfa_export.graphs.quantised import format_of
from ojfa_export.graphs.weights import CONVERSION_CHUNK, map_tensors
from ojfa_export.models.chat_format import ChatFormat
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.head import FinalNorm, LanguageHead
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.progress import Progress
from ojfa_export.verify.check import Check


def export(exporter: Exporter, progress: Progress) -> None:
    """Writes every graph but the exit head, which waits for the shortcut."""
    blocks = exporter.checkpoint.spec.blocks
    with progress.task("exporting graphs", blocks + 2, "graphs") as task:
        exporter.embed()
        task.advance()
        for index in range(blocks):
            exporter.block(index)
            task.advance()
        exporter.final_head()
        task.advance()


def build_engines(
    bundle: Path, names: list[str], spec: ModelSpec, backend: Backend, progress: Progress
) -> None:
    """Builds the engines of the named graphs; progress counts those that graphs share once."""
    directory = bundle / ENGINES / backend.name
    directory.mkdir(parents=True, exist_ok=True)
    graphs = {name: bundle / GRAPHS / f"{name}.onnx" for name in names}
    needed = {
        name: backend.engine_names(spec, path) if isinstance(backend, SharesEngines) else [name]
        for name, path in graphs.items()
    }
    total = len(set(itertools.chain(*needed.values())))
    built: set[str] = set()
    with progress.task(f"building {backend.name} engines", total, "engines") as task:
        for name, path in graphs.items():
            backend.build_engine(spec, path, directory / f"{name}{backend.suffix}")
            new = set(needed[name]) - built
            built |= new
            task.advance(len(new))


def engine_files(bundle: Path, backend: Backend, names: list[str]) -> dict[str, Path]:
    """Engine files by graph name."""
    directory = bundle / ENGINES / backend.name
    return {name: directory / f"{name}{backend.suffix}" for name in names}


def open_engines(inputs: Inputs, work: Work) -> Engines:
    """Opens the engines that ship, exit head and check head included."""
    spec, bundle = inputs.checkpoint.spec, work.bundle
    files = engine_files(bundle, inputs.backend, inputs.graph_names)
    check = engine_files(bundle, inputs.backend, [CHECK_HEAD])
    files |= {name: path for name, path in check.items() if path.exists()}
    graphs, rotary = bundle / GRAPHS, rotary_tables(bundle)
    engines = inputs.backend.open_engines(spec, graphs, files, rotary)
    shortcut = inputs.given.exits
    if isinstance(shortcut, BlockShortcut):
        jump = BlockJump(shortcut.exits, shortcut.blocks, spec, graphs, files, rotary)
        open_jump(inputs.backend, engines, jump)
    return engines


def rotary_tables(bundle: Path) -> tuple[Float32, Float32] | None:
    """The bundle's tables of rotations."""
    tables = describe_rotary(bundle)
    if tables is None:
        return None
    cos, sin = (
        np.memmap(bundle / each.file, np.float32, "r", each.offset, each.shape)
        for each in (tables.cos, tables.sin)
    )
    return cos, sin


def language_head(checkpoint: Checkpoint, graphs: Path) -> LanguageHead:
    """The model's own norm and head, the matrix mapped from the exported weights.

    A quantised one is dequantised, into a file without a name that goes when nothing maps it.
    """
    model = onnx.load(graphs / "final_head.onnx", load_external_data=False)
    arrays = map_tensors(model, graphs)
    quantised, form = matrix_of(arrays, "head"), format_of(model)
    if quantised is not None and form is not None:
        arrays["head"] = _dequantised(quantised, form, graphs)
    spec = checkpoint.spec
    norm = FinalNorm(
        spec.norm, arrays["final_norm.weight"], arrays.get("final_norm.bias"), spec.norm_epsilon
    )
    return LanguageHead(norm, arrays["head"], None, spec.logit_softcap)


def _dequantised(matrix: QuantisedMatrix, form: WeightFormat, directory: Path) -> Float32:
    """A head [V, H] float32, in a file, a few rows at a time."""
    outputs, groups = matrix.scales.shape
    inputs = form.inputs_of(groups)
    step = max(1, CONVERSION_CHUNK // inputs)
    with tempfile.TemporaryFile(dir=directory) as file:
        result: Float32 = np.memmap(file, np.float32, "w+", shape=(outputs, inputs))
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        result[rows] = dequantise(matrix.rows(rows), form)
    return result


def find_golden(inputs: Inputs, work: Work) -> tuple[Golden, ...]:
    """Tokens that the finished engines must reproduce."""
    spec, engines = inputs.checkpoint.spec, open_engines(inputs, work)
    settings = inputs.settings
    return make_golden(
        spec,
        frugal(engines, spec),
        inputs.windows.held_out,
        settings.max_cache_length,
        settings.precision,
    )


def write_manifest(
    bundle: Path,
    inputs: Inputs,
    report: CalibrationReport,
    golden: tuple[Golden, ...],
    decided: Decided,
    draft: DraftEntry | None,
    check: CheckEntry | None,
) -> Manifest:
    """Writes the manifest over everything that is in the bundle."""
    checkpoint, settings, spec = inputs.checkpoint, inputs.settings, inputs.checkpoint.spec
    shortcut, _ = load_exit(bundle / SHORTCUT)
    names = inputs.graph_names
    manifest = Manifest(
        model=Model(
            name=inputs.name,
            revision=inputs.options.revision,
            sha256=inputs.model_sha256,
            config=checkpoint.config.fields,
            ignored_fields=inputs.options.ignore_config_fields,
            spec=spec,
        ),
        precision=settings.precision,
        opset=OPSET,
        cache=CacheLayout(
            max_length=settings.max_cache_length, max_batch_size=settings.max_batch_size
        ),
        rotary=describe_rotary(bundle),
        graphs=describe_some(bundle, names),
        engines=(engine_set(bundle, inputs.backend, names),),
        shortcut=ShortcutEntry.of(shortcut),
        calibration=Calibration(
            sources=tuple(
                CalibrationSource(name=text.name, sha256=text.sha256, bytes=text.size)
                for text in inputs.texts
            ),
            tokens_fit=report.tokens_fitted,
            tokens_held_out=report.tokens_held_out,
        ),
        golden=golden,
        auto=decided.auto,
        promise=decided.promise,
        default=decided.default,
        generation=checkpoint.generation,
        draft=draft,
        check=check,
        weights=inputs.weight_format,
        files=describe_files(bundle),
        built=Built(
            time=datetime.now(timezone.utc), host=platform.node(), versions=tool_versions()
        ),
    )
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def engine_set(bundle: Path, backend: Backend, names: list[str]) -> EngineSet:
    """The manifest's entry for a backend's engines."""
    files = engine_files(bundle, backend, names)
    return EngineSet(
        backend=backend.name,
        files={name: path.relative_to(bundle).as_posix() for name, path in files.items()},
        built_with=backend.versions(),
    )


def write_tokenizer(tokenizer: Tokenizer, bundle: Path) -> None:
    """Writes tokenizer.json."""
    tokenizer.save(str(bundle / TOKENIZER))


def write_chat(chat: ChatFormat | None, bundle: Path) -> None:
    """Writes chat.json, if the checkpoint has a chat template."""
    if chat is not None:
        (bundle / CHAT).write_text(chat.model_dump_json(indent=2) + "\n", encoding="utf-8")


def save_report(report: CalibrationReport, path: Path) -> None:
    """Keeps a report between stages."""
    path.write_text(report.model_dump_json(), encoding="utf-8")


def load_report(path: Path, checks: list[Check], promise: Promise | None) -> CalibrationReport:
    """Reads a kept report, and adds the verification's checks and the promise."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    added = {
        "checks": [check.model_dump() for check in checks],
        "promise": promise and promise.model_dump(),
    }
    return CalibrationReport.model_validate({**raw, **added})
