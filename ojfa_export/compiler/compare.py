"""Runs a comparison: text through the blocks, every kind fitted, measured and judged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.names import GRAPHS, block_name
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import ExitShortcut, exits_of
from ojfa_export.compiler import stages
from ojfa_export.compiler.fingerprints import fingerprint
from ojfa_export.compiler.given import read_exit_shortcut
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.shortcut_stage import on_windows, run_text
from ojfa_export.compiler.work import Work, check_output
from ojfa_export.errors import OjfaError, UsageError
from ojfa_export.graphs.export import ExitHead, Exporter
from ojfa_export.graphs.fold import fold_if_narrow
from ojfa_export.models.head import LanguageHead
from ojfa_export.planning.machine import describe_machine
from ojfa_export.shortcuts.calibrate import has_torch, tokens_of
from ojfa_export.shortcuts.comparison.claims import judge
from ojfa_export.shortcuts.comparison.cost import FOLDED, HEADS, RESIDUAL, measure_heads
from ojfa_export.shortcuts.comparison.fit import Fitted, fit_kinds
from ojfa_export.shortcuts.comparison.model import Comparison, HeadCost, KindResult
from ojfa_export.shortcuts.comparison.write import NAMED, write_comparison
from ojfa_export.shortcuts.hidden import HiddenStates
from ojfa_export.shortcuts.kinds import KINDS, TITLES, ExitMap, Kind
from ojfa_export.shortcuts.measure import evaluate_shortcut
from ojfa_export.shortcuts.metrics import ExitQuality, FullModelReference, evaluate
from ojfa_export.shortcuts.sample import exit_sample
from ojfa_export.system.progress import Progress

PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch")


def compare_shortcuts(
    options: BuildOptions, descend: bool, progress: Progress, given: Sequence[Path] = ()
) -> Comparison:
    """Compares all kinds of shortcut on a checkpoint, and writes the report.

    Args:
        options: `output` is the directory to write, whole or not at all.
        descend: Whether to train narrow jumps by gradient descent, too.
        progress: Shows what is done.
        given: Files of shortcuts to show beside them.

    Raises:
        OjfaError: Bad input, or torch is not installed.
    """
    check_output(options.output, options.overwrite, NAMED)
    if not has_torch():
        raise OjfaError(
            "comparing shortcuts needs torch, which is not installed",
            hint="pip install 'ojfa-export[verify]'",
        )
    inputs = Inputs(options)
    others = {
        f"given: {path.name}": read_exit_shortcut(path, inputs.checkpoint, inputs.model_sha256)
        for path in given
    }
    if len(others) < len(given):
        raise UsageError("two shortcuts have files of one name", hint="rename one of them")
    with Work(options.output, f"compare {fingerprint(inputs)}").open() as work:
        settings, graphs = inputs.settings, work.bundle / GRAPHS
        exporter = Exporter(
            inputs.checkpoint, graphs, settings.precision, settings.max_cache_length
        )
        states = _run_text(inputs, exporter, work, progress)
        head = stages.language_head(inputs.checkpoint, graphs)
        blocks, fit_tokens = inputs.checkpoint.spec.blocks, inputs.windows.fit.size
        fitted = fit_kinds(
            states, blocks, fit_tokens, head, settings.rank, descend, work.scratch, progress
        )
        report = _measure(inputs, exporter, states, head, fitted, others, work, progress)
        written = work.scratch / "comparison"
        shutil.rmtree(written, ignore_errors=True)  # of an interrupted run
        written.mkdir()
        write_comparison(report, written)
        check_output(options.output, options.overwrite, NAMED)  # it may have come to be meanwhile
        work.publish(written)
    return report


def _run_text(inputs: Inputs, exporter: Exporter, work: Work, progress: Progress) -> HiddenStates:
    spec, backend = inputs.checkpoint.spec, inputs.backend
    names = ["embed", *map(block_name, range(spec.blocks))]
    with work.stage("export") as needed:
        if needed:
            stages.export(exporter, progress)
    with work.stage("engines") as needed:
        if needed:
            stages.build_engines(work.bundle, names, spec, backend, progress)
    return run_text(inputs, work, progress)


def _measure(
    inputs: Inputs,
    exporter: Exporter,
    states: HiddenStates,
    head: LanguageHead,
    fitted: Fitted,
    others: Mapping[str, ExitShortcut],
    work: Work,
    progress: Progress,
) -> Comparison:
    spec = inputs.checkpoint.spec
    one_jump, residual = fitted.maps["ojfa"], fitted.maps["residual"]
    assert isinstance(one_jump, Shortcut)
    assert isinstance(residual, Shortcut)
    sample = exit_sample(states, spec.blocks, inputs.windows.fit.size, head)
    reference = FullModelReference(sample.hidden(spec.blocks), head, work.scratch)
    maps: dict[str, ExitMap] = {str(kind): each for kind, each in fitted.maps.items()}
    rotary = stages.rotary_tables(work.bundle)
    given = {name: on_windows(inputs, each, rotary) for name, each in others.items()}
    qualities: dict[str, list[ExitQuality]] = {name: [] for name in [*maps, *others]}
    with progress.task("comparing: measuring exits", spec.blocks - 1, "exits") as task:
        for depth in range(1, spec.blocks):
            hidden = sample.hidden(depth)
            for kind, each in maps.items():
                likeliest = partial(tokens_of, each, head, depth)
                qualities[kind].append(evaluate(likeliest, hidden, reference))
            for name, other in others.items():
                if depth in exits_of(other, spec.blocks):
                    found = evaluate_shortcut(given[name], head, depth, sample, reference)
                    qualities[name].append(found)
            task.advance()
    heads: dict[str, ExitHead] = {FOLDED: fold_if_narrow(one_jump, head), RESIDUAL: residual}
    heads |= {name: fold_if_narrow(each, head) for name, each in others.items()}
    with progress.task("comparing: timing checks", 1, "rounds") as task:
        costs = measure_heads(exporter, heads, work.scratch)
        task.advance()
    report = Comparison(
        model=inputs.name,
        model_sha256=inputs.model_sha256,
        blocks=spec.blocks,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        rank=inputs.settings.rank,
        calibration_sources=[text.name for text in inputs.texts],
        tokens_fitted=inputs.windows.fit.size,
        tokens_measured=len(sample.rows),
        kinds=[
            *(_result(kind, fitted, costs[HEADS[kind]], qualities[kind]) for kind in KINDS),
            *(_given(name, each, costs[name], qualities[name]) for name, each in others.items()),
        ],
        precision_at_1=fitted.matrix.precision_at_1.tolist(),
        surprisal=fitted.matrix.surprisal.tolist(),
        descent=fitted.descent,
        distillation=fitted.distillation,
        claims=[],
        machine=describe_machine(PACKAGES),
    )
    return report.model_copy(update={"claims": judge(report)})


def _result(kind: Kind, fitted: Fitted, check: HeadCost, exits: list[ExitQuality]) -> KindResult:
    parameters = fitted.maps[kind].parameters
    return KindResult(
        kind=kind,
        title=TITLES[kind],
        parameters=parameters,
        bytes=4 * parameters,
        fitted_at=fitted.levels.get(kind),
        fit_seconds=fitted.seconds[kind],
        check=check,
        exits=exits,
    )


def _given(
    name: str, shortcut: ExitShortcut, check: HeadCost, exits: list[ExitQuality]
) -> KindResult:
    served = shortcut.exits if isinstance(shortcut, BlockShortcut) else None
    at = "" if served is None else f", at exits {', '.join(map(str, served))}"
    return KindResult(
        kind=None,
        title=f"{shortcut.kind}, {name}{at}",
        served=served,
        parameters=shortcut.parameters,
        bytes=4 * shortcut.parameters,
        fitted_at=None,
        fit_seconds=0.0,
        check=check,
        exits=exits,
    )
