"""The stages of a build, each from files to files."""

from __future__ import annotations

import json
import math
import platform
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnx
from tokenizers import Tokenizer

from ojfa_export.backends.backend import Backend, Float32
from ojfa_export.backends.frugal import frugal
from ojfa_export.build.describe import describe_files, describe_graphs, describe_rotary
from ojfa_export.build.golden import make_golden
from ojfa_export.build.inputs import Inputs
from ojfa_export.build.versions import tool_versions
from ojfa_export.build.work import Work
from ojfa_export.bundle.manifest import (
    Built,
    CacheLayout,
    Calibration,
    CalibrationSource,
    EngineSet,
    Golden,
    Manifest,
    Model,
    ShortcutEntry,
)
from ojfa_export.bundle.names import (
    ENGINES,
    GRAPHS,
    MANIFEST,
    SHORTCUT,
    STATISTICS,
    TOKENIZER,
    block_name,
    graph_names,
)
from ojfa_export.calibrate.calibrate import Calibrated, calibrate
from ojfa_export.calibrate.hidden import collect_hidden_states
from ojfa_export.checkpoint.checkpoint import Checkpoint
from ojfa_export.families.spec import ModelSpec
from ojfa_export.graphs.export import Exporter
from ojfa_export.graphs.graph import OPSET
from ojfa_export.graphs.weights import references
from ojfa_export.guarantee import Costs, ExitStatistics, Promise, certify, save_statistics
from ojfa_export.guarantee.collect import collect_statistics
from ojfa_export.progress import Progress
from ojfa_export.report.model import CalibrationReport, Check, ExitReport
from ojfa_export.runtime.policy import ExitPolicy
from ojfa_export.shortcut import FinalNorm, LanguageHead, load, save

# Of the tokens that a promise is measured on: the same in every build.
SAMPLING_SEED = 0
# What `--exit auto` means where no early exit keeps the promise.
FULL_DEPTH = ExitPolicy(exits=(), measure="top", thresholds=())


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
    """Builds the engines of the named graphs."""
    directory = bundle / ENGINES / backend.name
    directory.mkdir(parents=True, exist_ok=True)
    with progress.task(f"building {backend.name} engines", len(names), "engines") as task:
        for name in names:
            engine = directory / f"{name}{backend.suffix}"
            backend.build_engine(spec, bundle / GRAPHS / f"{name}.onnx", engine)
            task.advance()


def engine_files(bundle: Path, backend: Backend, names: list[str]) -> dict[str, Path]:
    """Engine files by graph name."""
    directory = bundle / ENGINES / backend.name
    return {name: directory / f"{name}{backend.suffix}" for name in names}


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
    """The model's own norm and head, the matrix mapped from the exported weights."""
    refs = references(onnx.load(graphs / "final_head.onnx", load_external_data=False))
    arrays = {
        name: np.memmap(
            graphs / ref.location,
            np.float16 if ref.dtype == onnx.TensorProto.FLOAT16 else np.float32,
            "r",
            ref.offset,
            ref.dims,
        )
        for name, ref in refs.items()
    }
    spec = checkpoint.spec
    norm = FinalNorm(
        spec.norm, arrays["final_norm.weight"], arrays.get("final_norm.bias"), spec.norm_epsilon
    )
    return LanguageHead(norm, arrays["head"], None)


def run_calibration(inputs: Inputs, work: Work, progress: Progress) -> Calibrated:
    """Fits and chooses the shortcut, and writes shortcut.safetensors."""
    checkpoint, backend, windows = inputs.checkpoint, inputs.backend, inputs.windows
    spec = checkpoint.spec
    names = ["embed", *map(block_name, range(spec.blocks))]
    states = collect_hidden_states(
        spec,
        backend,
        work.bundle / GRAPHS,
        engine_files(work.bundle, backend, names),
        rotary_tables(work.bundle),
        np.concatenate([windows.fit, windows.held_out]),
        work.scratch,
        progress,
    )
    head = language_head(checkpoint, work.bundle / GRAPHS)
    calibrated = calibrate(
        states, spec.blocks, windows.fit.size, head, inputs.settings.rank, work.scratch, progress
    )
    save(calibrated.shortcut, work.bundle / SHORTCUT, inputs.model_sha256)
    return calibrated


def make_promise(inputs: Inputs, work: Work, progress: Progress) -> None:
    """Certifies when tokens may leave early, and writes statistics.npz.

    The promise is kept in the scratch directory for the manifest.
    """
    windows, limits = inputs.promise_windows, inputs.settings.limits
    if windows is None or limits is None:
        return
    spec, backend, bundle = inputs.checkpoint.spec, inputs.backend, work.bundle
    files, rotary = engine_files(bundle, backend, graph_names(spec.blocks)), rotary_tables(bundle)
    pairs = [np.concatenate(p) for p in zip(windows.tuning, windows.certification, strict=True)]
    statistics = collect_statistics(
        spec,
        lambda: backend.open_engines(spec, bundle / GRAPHS, files, rotary),
        windows.domains,
        pairs,
        work.scratch,
        progress,
        np.random.default_rng(SAMPLING_SEED),
    )
    tuned = np.concatenate(
        [
            np.arange(len(pair)) < len(tuning)
            for pair, tuning in zip(pairs, windows.tuning, strict=True)
        ]
    )
    splits: dict[str, ExitStatistics] = {
        "tuning": statistics.select(np.flatnonzero(tuned)),
        "certification": statistics.select(np.flatnonzero(~tuned)),
    }
    promise = certify(splits["tuning"], splits["certification"], limits, token_costs(bundle, spec))
    save_statistics(bundle / STATISTICS, splits)
    (work.scratch / "promise.json").write_text(promise.model_dump_json(), encoding="utf-8")


def load_promise(work: Work) -> Promise | None:
    """The promise that `make_promise` kept, if there is one."""
    path = work.scratch / "promise.json"
    if not path.exists():
        return None
    return Promise.model_validate_json(path.read_text(encoding="utf-8"))


def token_costs(bundle: Path, spec: ModelSpec) -> Costs:
    """Costs by the bytes of weights read, which bound decoding."""

    def read(name: str) -> float:
        model = onnx.load(bundle / GRAPHS / f"{name}.onnx", load_external_data=False)
        refs = references(model).values()
        return float(sum(math.prod(ref.dims) for ref in refs))

    blocks = [read(block_name(index)) for index in range(spec.blocks)]
    return Costs(block=sum(blocks) / len(blocks), check=read("exit_head"), final=read("final_head"))


def make_report(inputs: Inputs, calibrated: Calibrated) -> CalibrationReport:
    """The report of a calibration."""
    spec, shortcut = inputs.checkpoint.spec, calibrated.shortcut
    exits = zip(calibrated.one_jump, calibrated.multi_jump, calibrated.identity, strict=True)
    return CalibrationReport(
        model=inputs.name,
        blocks=spec.blocks,
        hidden_size=spec.hidden_size,
        rank=shortcut.rank,
        kind=shortcut.kind,
        fitted_at=shortcut.fitted_at,
        reason=calibrated.choice.reason,
        parameters=shortcut.parameters,
        parameters_multi_jump=shortcut.parameters * (spec.blocks - 1),
        calibration_sources=[text.name for text in inputs.texts],
        tokens_fitted=inputs.windows.fit.size,
        tokens_held_out=calibrated.tokens_measured,
        exits=[
            ExitReport(blocks=depth, ojfa=one, multi_jump=multi, identity=identity)
            for depth, (one, multi, identity) in enumerate(exits, start=1)
        ],
        precision_at_1=calibrated.matrix.precision_at_1.tolist(),
        surprisal=calibrated.matrix.surprisal.tolist(),
    )


def find_golden(inputs: Inputs, work: Work) -> tuple[Golden, ...]:
    """Tokens that the finished engines must reproduce."""
    spec, backend = inputs.checkpoint.spec, inputs.backend
    engines = backend.open_engines(
        spec,
        work.bundle / GRAPHS,
        engine_files(work.bundle, backend, graph_names(spec.blocks)),
        rotary_tables(work.bundle),
    )
    return make_golden(
        spec, frugal(engines, spec), inputs.windows.held_out, inputs.settings.max_cache_length
    )


def write_manifest(
    bundle: Path,
    inputs: Inputs,
    report: CalibrationReport,
    golden: tuple[Golden, ...],
    promise: Promise | None,
) -> Manifest:
    """Writes the manifest over everything that is in the bundle."""
    checkpoint, settings, spec = inputs.checkpoint, inputs.settings, inputs.checkpoint.spec
    shortcut, _ = load(bundle / SHORTCUT)
    names = graph_names(spec.blocks)
    manifest = Manifest(
        model=Model(
            name=inputs.name,
            revision=inputs.options.revision,
            sha256=inputs.model_sha256,
            config=checkpoint.config.fields,
            spec=spec,
        ),
        precision=settings.precision,
        opset=OPSET,
        cache=CacheLayout(
            max_length=settings.max_cache_length, max_batch_size=settings.max_batch_size
        ),
        rotary=describe_rotary(bundle),
        graphs=describe_graphs(bundle, spec.blocks),
        engines=(engine_set(bundle, inputs.backend, names),),
        shortcut=ShortcutEntry(
            kind=shortcut.kind,
            rank=shortcut.rank,
            fitted_at=shortcut.fitted_at,
            residual=shortcut.residual,
            parameters=shortcut.parameters,
        ),
        calibration=Calibration(
            sources=tuple(
                CalibrationSource(name=text.name, sha256=text.sha256, bytes=text.size)
                for text in inputs.texts
            ),
            tokens_fit=report.tokens_fitted,
            tokens_held_out=report.tokens_held_out,
        ),
        golden=golden,
        auto=(promise.policy or FULL_DEPTH) if promise else None,
        promise=promise,
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


def save_report(report: CalibrationReport, path: Path) -> None:
    """Keeps a report between stages."""
    path.write_text(report.model_dump_json(), encoding="utf-8")


def load_report(path: Path, checks: list[Check]) -> CalibrationReport:
    """Reads a kept report and adds the verification's checks."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return CalibrationReport.model_validate(
        {**raw, "checks": [check.model_dump() for check in checks]}
    )
