"""The stages alone: a shortcut without a bundle, graphs without engines."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.names import (
    DRAFT_GRAPHS,
    GRAPHS,
    SHORTCUT,
    block_name,
    exit_names,
    graph_names,
)
from ojfa_export.compiler import stages
from ojfa_export.compiler.fingerprints import fingerprint
from ojfa_export.compiler.given import read_given
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.report.write import write_report
from ojfa_export.compiler.shortcut_stage import report_calibrated, run_calibration, run_text
from ojfa_export.compiler.work import Work, check_output
from ojfa_export.errors import UsageError
from ojfa_export.graphs.fold import fold_if_narrow
from ojfa_export.system.progress import Progress
from ojfa_export.system.publish import publish


def calibrate_only(
    options: BuildOptions, progress: Progress, report: Path | None = None
) -> dict[str, Any]:
    """Fits and chooses the shortcut of a checkpoint.

    Args:
        options: `output` is the shortcut file to write.
        progress: Shows what is done.
        report: Directory for the report, or None.

    Raises:
        OjfaError: Bad input.
    """
    check_output(options.output, options.overwrite, holds=None)
    for each in options.shortcuts:
        if isinstance(each, Path):
            raise UsageError(
                f"{each} is a shortcut already", hint="build with it: 'build --shortcut'"
            )
    inputs = Inputs(options)
    with Work(options.output, f"calibrate {fingerprint(inputs)}").open() as work:
        exporter = inputs.exporter(work.bundle / GRAPHS)
        with work.stage("export") as needed:
            if needed:
                stages.export(exporter, progress)
        names = ["embed", *map(block_name, range(inputs.checkpoint.spec.blocks))]
        with work.stage("engines") as needed:
            if needed:
                spec = inputs.checkpoint.spec
                stages.build_engines(work.bundle, names, spec, inputs.backend, progress)
        states = run_text(inputs, work, progress)
        calibrated = run_calibration(inputs, states, work, progress)
        result = report_calibrated(inputs, calibrated)
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            write_report(result, report)
        check_output(options.output, options.overwrite, holds=None)  # it may have come to be
        work.publish(work.bundle / SHORTCUT)
    return {"shortcut": str(options.output), **result.model_dump(mode="json")}


def export_only(
    options: BuildOptions, shortcuts: Sequence[Path], progress: Progress
) -> dict[str, Any]:
    """Writes a checkpoint's graphs.

    Args:
        options: `output` is the directory to write.
        shortcuts: Of exits, without which the exit head is left out; and a draft layer.
        progress: Shows graphs.

    Raises:
        OjfaError: Bad input, or a shortcut that was fitted on another model.
    """
    check_output(options.output, options.overwrite, holds="embed.onnx")
    inputs = Inputs(options)
    given = read_given(shortcuts, inputs.checkpoint, inputs.model_sha256)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=options.output.absolute().parent, prefix=f"{options.output.name}."
    ) as temporary:
        directory = Path(temporary) / "graphs"
        directory.mkdir()
        exporter = inputs.exporter(directory)
        stages.export(exporter, progress)
        blocks = inputs.checkpoint.spec.blocks
        names = [name for name in graph_names(blocks) if name != "exit_head"]
        if given.exits is not None:
            head = stages.language_head(inputs.checkpoint, exporter.directory)
            exporter.shortcut(fold_if_narrow(given.exits, head))
            behind = given.exits.blocks if isinstance(given.exits, BlockShortcut) else 0
            names += exit_names(behind)
        if given.draft is not None:
            exporter.draft(given.draft)
            names += DRAFT_GRAPHS
        check_output(options.output, options.overwrite, holds="embed.onnx")
        publish(directory, options.output)
    return {"directory": str(options.output), "graphs": names}
