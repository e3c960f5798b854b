"""Builds a bundle: checkpoint -> graphs -> engines -> shortcut -> exit head -> verified bundle."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.manifest import read_manifest
from ojfa_export.bundle.names import (
    CHECK_HEAD,
    DRAFT_GRAPHS,
    GRAPHS,
    MANIFEST,
    REPORT,
    STATISTICS,
)
from ojfa_export.bundle.promise import Promise
from ojfa_export.compiler import exits, stages, statistics_stage
from ojfa_export.compiler.check_stage import kept_check, make_check, may_check, with_golden
from ojfa_export.compiler.decided import Decided, load_decided, why_not_planned
from ojfa_export.compiler.draft_stage import kept_draft, make_draft
from ojfa_export.compiler.fingerprints import fingerprint, stage_keys
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.compiler.report.write import write_report
from ojfa_export.compiler.self_text import write_self_text
from ojfa_export.compiler.shortcut_stage import (
    kept_states,
    make_shortcut,
    remove_states,
    run_text,
)
from ojfa_export.compiler.work import StageRecord, Work, check_output
from ojfa_export.graphs.export import Exporter
from ojfa_export.runtime.model import Model
from ojfa_export.system.heap import release_memory
from ojfa_export.system.pictures import check_can_draw
from ojfa_export.system.progress import SILENT, Progress
from ojfa_export.verify.change import Change
from ojfa_export.verify.check import Check
from ojfa_export.verify.outcome import raise_failed
from ojfa_export.verify.verify import compare_blocks, has_reference

VERIFIED_SEQUENCES = 2
VERIFIED_TOKENS = 48


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    Attributes:
        bundle: Its directory.
        report: The calibration report, with the verification's checks.
        stages: What was done, and what it cost.
        decided: What was asked and shown of `--exit auto`, and what is done where no way is named.
    """

    bundle: Path
    report: CalibrationReport
    stages: list[StageRecord]
    decided: Decided

    @property
    def promise(self) -> Promise | None:
        """What was asked and shown of `--exit auto`, if anything."""
        return self.decided.promise

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        report = self.report
        return {
            "bundle": str(self.bundle),
            "model": report.model,
            "blocks": report.blocks,
            "rank": report.rank,
            "shortcut": report.kind,
            "fitted_at": report.fitted_at,
            "reason": report.reason,
            "stages": [asdict(stage) for stage in self.stages],
            **({"weights": report.weights} if report.weights else {}),
            **({"change": report.change.model_dump()} if report.change else {}),
            **({"check": report.check} if report.check else {}),
            "checks": [check.model_dump() for check in report.checks],
            **self.decided.model_dump(mode="json"),
            "report": str(self.bundle / REPORT / "report.html"),
        }

    def _why_not_planned(self) -> str:
        manifest = read_manifest(self.bundle)
        return why_not_planned(manifest.model.spec, STATISTICS in manifest.files)

    def summary(self) -> str:
        """A few lines for people."""
        report, default = self.report, self.decided.default
        verified = f"{len(report.checks)} checks passed" if report.checks else "not verified"
        if report.checks and not has_reference():
            verified += " against float64; transformers, which is not installed, was not compared"
        return (
            f"{self.bundle}: {report.blocks} blocks, {report.shortcut}, {verified}\n"
            + (f"weights: {report.weights}" if report.weights else "")
            + (f"; {report.change}" if report.change else "")
            + ("\n" if report.weights else "")
            + f"exits: {report.worth}\n"
            + (f"checks: {report.check}\n" if report.check else "")
            + (f"exit auto: {self.promise.reason}\n" if self.promise else "")
            + f"default: {default.reason if default else self._why_not_planned()}\n"
            + f"report: {self.bundle / REPORT / 'report.html'}"
        )


def build(options: BuildOptions, progress: Progress = SILENT) -> BuildResult:
    """Builds a bundle, whole or not at all; work that an earlier run finished is kept.

    Raises:
        OjfaError: Bad input, or a result that differs from the reference.
    """
    check_output(options.output, options.overwrite)
    check_can_draw()
    inputs = Inputs(options)
    keys = stage_keys(inputs)
    with Work(options.output, fingerprint(inputs), keys=keys).open() as work:
        _say_kept(work, len(keys), progress)
        _make_parts(inputs, work, progress)
        report, decided = _verify(inputs, work, progress)
        check_output(options.output, options.overwrite)  # it may have come to be meanwhile
        work.publish()
    return BuildResult(options.output, report, work.records, decided)


def _say_kept(work: Work, stages: int, progress: Progress) -> None:
    """Says what of an earlier run is gone on with, and what would have to be another."""
    if not work.finished and not work.dropped:
        return
    what = f"kept of an earlier run: {', '.join(work.finished) or 'nothing'}"
    if work.dropped:
        what += f"; not {', '.join(work.dropped)}, which another command had made"
    with progress.task(what, stages, "stages") as task:
        task.advance(len(work.finished))


def _make_parts(inputs: Inputs, work: Work, progress: Progress) -> None:
    spec, backend = inputs.checkpoint.spec, inputs.backend
    exporter = inputs.exporter(work.bundle / GRAPHS)
    with work.stage("export") as needed:
        if needed:
            stages.export(exporter, progress)
            stages.write_tokenizer(inputs.tokenizer, work.bundle)
            stages.write_chat(inputs.chat, work.bundle)
    with work.stage("engines") as needed:
        if needed:
            names = [name for name in inputs.graph_names if name not in inputs.exit_names]
            stages.build_engines(work.bundle, names, spec, backend, progress)
    if "calibrate" not in work.finished:  # hidden states are not kept after it
        with work.stage("text") as needed:
            if needed:
                run_text(inputs, work, progress)
    with work.stage("calibrate") as needed:
        if needed:
            states = kept_states(inputs, work)
            head, report = make_shortcut(inputs, states, work, progress)
            exporter.shortcut(head)
            stages.build_engines(work.bundle, inputs.exit_names, spec, backend, progress)
            stages.save_report(report, work.scratch / "report.json")
            for path in work.scratch.glob("*.f32"):
                path.unlink()
    remove_states(work)
    _make_extras(inputs, work, exporter, progress)
    if inputs.decides_exits:
        _decide_exits(inputs, work, progress)


def _make_extras(inputs: Inputs, work: Work, exporter: Exporter, progress: Progress) -> None:
    """What not every bundle has: a draft layer, text of the model's own, a check head."""
    if inputs.given.draft is not None:
        with work.stage("draft") as needed:
            if needed:
                make_draft(inputs, work, exporter, progress)
    if inputs.self_text is not None:
        with work.stage("self-text") as needed:
            if needed:
                write_self_text(inputs.checkpoint, inputs.self_text, work, progress)
    if may_check(inputs):
        with work.stage("check") as needed:
            if needed:
                make_check(inputs, work, exporter, progress)


def _decide_exits(inputs: Inputs, work: Work, progress: Progress) -> None:
    with work.stage("statistics") as needed:
        if needed:
            statistics_stage.collect(inputs, work, progress)
    if inputs.options.limits is not None:
        with work.stage("certification") as needed:
            if needed:
                statistics_stage.collect_certified(inputs, work, progress)
    with work.stage("exits") as needed:
        if needed:
            exits.decide(inputs, work, progress)


def _verify(inputs: Inputs, work: Work, progress: Progress) -> tuple[CalibrationReport, Decided]:
    """Compares with transformers, and finishes report and manifest."""
    kept = work.scratch / "report.json"
    checks: list[Check] = []
    change: Change | None = None
    with work.stage("verify"):
        golden = stages.find_golden(inputs, work)
        release_memory()  # a whole model in each of the two, and one more to compare
        check = with_golden(kept_check(work), inputs, work)
        release_memory()
        decided = load_decided(work)
        report = stages.load_report(kept, [], decided.promise)
        draft = kept_draft(work)
        if not inputs.options.skip_verification:
            stages.write_manifest(work.bundle, inputs, report, golden, decided, draft, check)
            checks, change = _compare(inputs, work.bundle, progress)
            report = stages.load_report(kept, checks, decided.promise)
        said = {
            "weights": _weights_in_words(inputs),
            "change": change,
            "check": check and check.reason,
        }
        report = report.model_copy(update=said)
        write_report(report, work.bundle / REPORT)
        (work.bundle / MANIFEST).unlink(missing_ok=True)
        stages.write_manifest(work.bundle, inputs, report, golden, decided, draft, check)
    return report, decided


def _weights_in_words(inputs: Inputs) -> str | None:
    """What weights are stored as, where that is not as precision alone says."""
    form, layout = inputs.weight_format, inputs.checkpoint.layout
    if layout is None:
        return None if form is None else str(form)
    return f"{form or inputs.settings.precision}, the checkpoint's own ({layout.name})"


def _compare(inputs: Inputs, bundle: Path, progress: Progress) -> tuple[list[Check], Change | None]:
    """Compares the engines with float64, and where transformers is installed, all with that.

    Returns:
        The checks, and where weights are quantised, what that changed.
    """
    opened, backend = Bundle(bundle), inputs.backend.name
    model = Model(opened, backend)
    rows = inputs.windows.held_out[:VERIFIED_SEQUENCES, :VERIFIED_TOKENS]
    token_ids = np.ascontiguousarray(rows)
    checks = compare_blocks(opened, model, backend, progress, token_ids)
    precision = inputs.settings.precision
    raise_failed(checks, "float64 on its own weights", precision, inputs.backend)
    if not has_reference():
        return checks, None
    from ojfa_export.verify.checks import verify_against  # needs torch

    against = verify_against(
        opened,
        model,
        inputs.checkpoint.directory,
        token_ids,
        progress,
        trust_remote_code=inputs.options.trust_remote_code,
    )
    raise_failed(against, "transformers", precision, inputs.backend)
    return checks + against, _measure_change(inputs, model, progress)


def _measure_change(inputs: Inputs, model: Model, progress: Progress) -> Change | None:
    """What quantising changed on held-out text."""
    if inputs.weight_format is None:
        return None
    from ojfa_export.verify.quantised import measure_change  # needs torch

    return measure_change(
        model,
        inputs.checkpoint,
        inputs.windows.held_out,
        progress,
        trust_remote_code=inputs.options.trust_remote_code,
    )


def plan(options: BuildOptions) -> dict[str, Any]:
    """What a build would do, for `--dry-run`: all input is checked, nothing is written."""
    check_output(options.output, options.overwrite)
    check_can_draw()
    inputs = Inputs(options)
    spec, settings = inputs.checkpoint.spec, inputs.settings
    tokens = inputs.windows.fit.size + inputs.windows.held_out.size
    drafting = inputs.given.draft is not None
    stored = sum(path.stat().st_size for path in inputs.checkpoint.weight_files)
    return {
        "checkpoint": inputs.name,
        "output": str(options.output),
        "spec": spec.model_dump(mode="json"),
        "settings": {
            **settings.model_dump(),
            "shortcut": ", ".join(map(str, options.shortcuts)) or None,
            "limits": options.limits and options.limits.model_dump(),
            "self_text": inputs.self_text and inputs.self_text.about,
            "calibration_data": [str(path) for path in inputs.calibration_data],
        },
        "stages": list(stage_keys(inputs)),
        "graphs": [
            *inputs.graph_names,
            *(DRAFT_GRAPHS if drafting else ()),
            *((CHECK_HEAD,) if settings.check_vocabulary else ()),
        ],
        "checkpoint_bytes": stored,
        "calibration_tokens": tokens,
        "scratch_bytes": 4 * tokens * spec.hidden_size * (spec.blocks + 1),
        "free_bytes": shutil.disk_usage(options.output.absolute().parent).free,
    }
