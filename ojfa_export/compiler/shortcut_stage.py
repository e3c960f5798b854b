"""The stage that gives a build its shortcut: fitted and chosen here, or given and measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from ojfa_export.bundle.block_shortcut import BlockShortcut, BlocksOnSequences
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.names import GRAPHS, SHORTCUT, block_name
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.bundle.shortcut_file import ExitShortcut, RowShortcut, save
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.report.model import CalibrationReport, ExitReport
from ojfa_export.compiler.stages import engine_files, language_head, rotary_tables
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.arrays import Float32
from ojfa_export.graphs.export import ExitHead
from ojfa_export.graphs.fold import fold_if_narrow
from ojfa_export.shortcuts.calibrate import Calibrated, calibrate
from ojfa_export.shortcuts.hidden import HiddenStates, collect_hidden_states
from ojfa_export.shortcuts.measure import Measured, measure
from ojfa_export.shortcuts.metrics import ExitQuality
from ojfa_export.system.progress import Progress

# Folder of the hidden states, within the scratch folder.
TEXT = "text"


def make_shortcut(
    inputs: Inputs, states: HiddenStates, work: Work, progress: Progress
) -> tuple[ExitHead, CalibrationReport]:
    """Writes shortcut.safetensors.

    Args:
        inputs: Of the build.
        states: Hidden states of `inputs.calibrated`.
        work: Where the shortcut goes.
        progress: Shows what is done.

    Returns:
        What the exit head is made of, and the report.
    """
    given = inputs.given
    if given.exits is None or given.exits_path is None:
        calibrated = run_calibration(inputs, states, work, progress)
        return calibrated.head, report_calibrated(inputs, calibrated)
    head = language_head(inputs.checkpoint, work.bundle / GRAPHS)
    blocks = inputs.checkpoint.spec.blocks
    jump = on_windows(inputs, given.exits, rotary_tables(work.bundle))
    measured = measure(states, blocks, jump, head, work.scratch, progress)
    given.copy(given.exits_path, work.bundle / SHORTCUT, inputs.model_sha256)
    return fold_if_narrow(given.exits, head), report_measured(inputs, measured)


def on_windows(
    inputs: Inputs, shortcut: ExitShortcut, rotary: tuple[Float32, Float32] | None
) -> RowShortcut | BlocksOnSequences:
    """A shortcut as it is measured: a block jump on whole windows of the calibration text."""
    if not isinstance(shortcut, BlockShortcut):
        return shortcut
    spec, length = inputs.checkpoint.spec, inputs.calibrated.shape[1]
    return BlocksOnSequences(shortcut, spec, rotary, length)


def run_calibration(
    inputs: Inputs, states: HiddenStates, work: Work, progress: Progress
) -> Calibrated:
    """Fits and chooses the shortcut, and writes shortcut.safetensors."""
    calibrated = calibrate(
        states,
        inputs.checkpoint.spec.blocks,
        inputs.windows.fit.size,
        language_head(inputs.checkpoint, work.bundle / GRAPHS),
        inputs.settings.rank,
        inputs.given.kind,
        work.scratch,
        progress,
    )
    save(calibrated.shortcut, work.bundle / SHORTCUT, inputs.model_sha256)
    return calibrated


def run_text(inputs: Inputs, work: Work, progress: Progress) -> HiddenStates:
    """Runs the calibration text through embedding and all blocks, whose engines have been built."""
    spec, backend = inputs.checkpoint.spec, inputs.backend
    directory = work.scratch / TEXT
    directory.mkdir(exist_ok=True)
    names = ["embed", *map(block_name, range(spec.blocks))]
    return collect_hidden_states(
        spec,
        backend,
        work.bundle / GRAPHS,
        engine_files(work.bundle, backend, names),
        rotary_tables(work.bundle),
        inputs.calibrated,
        directory,
        progress,
    )


def kept_states(inputs: Inputs, work: Work) -> HiddenStates:
    """The hidden states that `run_text` left."""
    hidden_size, tokens = inputs.checkpoint.spec.hidden_size, inputs.calibrated.size
    return HiddenStates(work.scratch / TEXT, hidden_size, tokens)


def remove_states(work: Work) -> None:
    """Removes the hidden states, gigabytes of a large model."""
    shutil.rmtree(work.scratch / TEXT, ignore_errors=True)


def report_calibrated(inputs: Inputs, calibrated: Calibrated) -> CalibrationReport:
    """The report of a calibration."""
    spec, shortcut = inputs.checkpoint.spec, calibrated.shortcut
    levels = spec.blocks - 1
    residual: Sequence[ExitQuality | None] = calibrated.residual or [None] * levels
    exits = zip(
        calibrated.one_jump, calibrated.multi_jump, calibrated.identity, residual, strict=True
    )
    return CalibrationReport(
        model=inputs.name,
        blocks=spec.blocks,
        hidden_size=spec.hidden_size,
        rank=shortcut.rank,
        kind=shortcut.kind,
        fitted_at=calibrated.choice.fitted_at,
        reason=calibrated.reason,
        parameters=shortcut.parameters,
        parameters_multi_jump=2 * spec.hidden_size * (shortcut.rank + 1) * levels,
        calibration_sources=[text.name for text in inputs.texts],
        tokens_fitted=inputs.windows.fit.size,
        tokens_held_out=calibrated.tokens_measured,
        exits=[
            ExitReport(blocks=depth, ojfa=one, multi_jump=multi, identity=identity, residual=shared)
            for depth, (one, multi, identity, shared) in enumerate(exits, start=1)
        ],
        precision_at_1=calibrated.matrix.precision_at_1.tolist(),
        surprisal=calibrated.matrix.surprisal.tolist(),
    )


def report_measured(inputs: Inputs, measured: Measured) -> CalibrationReport:
    """The report of a shortcut that was given."""
    spec, shortcut = inputs.checkpoint.spec, measured.shortcut
    each = zip(measured.exits, measured.quality, measured.identity, strict=True)
    return CalibrationReport(
        model=inputs.name,
        blocks=spec.blocks,
        hidden_size=spec.hidden_size,
        kind=shortcut.kind,
        rank=shortcut.rank if isinstance(shortcut, Shortcut) else None,
        width=shortcut.width if isinstance(shortcut, MlpShortcut) else None,
        exit_blocks=shortcut.blocks if isinstance(shortcut, BlockShortcut) else None,
        fitted_at=shortcut.fitted_at if isinstance(shortcut, Shortcut) else None,
        reason=f"The shortcut was given: {inputs.given.exits_path}. "
        f"Measured on {measured.tokens:,} held-out tokens.",
        parameters=shortcut.parameters,
        calibration_sources=[text.name for text in inputs.texts],
        tokens_held_out=measured.tokens,
        exits=[
            ExitReport(blocks=depth, given=quality, identity=identity)
            for depth, quality, identity in each
        ],
    )
