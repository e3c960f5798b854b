"""Bundles with a residual shortcut, or a given one: built, verified and run like any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from chain import random_mlp
from click.testing import CliRunner

import ojfa_export
from ojfa_export.bundle.names import SHORTCUT
from ojfa_export.bundle.shortcut_file import load, save
from ojfa_export.cli.app import app
from ojfa_export.compiler import parts
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import BuildResult, build
from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.errors import OjfaError, UsageError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.shortcuts import calibrate
from ojfa_export.system.progress import SILENT


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def residual(tiny_checkpoint, calibration_text, tmp_path_factory) -> BuildResult:
    """A verified bundle with a residual shortcut; not to be written to."""
    return build(
        BuildOptions(
            str(tiny_checkpoint),
            tmp_path_factory.mktemp("residual") / "out.ojfa",
            rank=8,
            shortcut="residual",
            calibration_data=(calibration_text,),
            calibration_tokens=1024,
            max_cache_length=64,
        )
    )


def report_of(bundle) -> CalibrationReport:
    text = (bundle / "report" / "report.json").read_text(encoding="utf-8")
    return CalibrationReport.model_validate_json(text)


def test_residual_bundle_is_verified_and_runs(residual):
    result = residual
    assert result.report.checks
    assert all(check.passed for check in result.report.checks)
    shortcut, _ = load(result.bundle / SHORTCUT)
    model = ojfa_export.load(result.bundle)
    entry = model.manifest.shortcut
    assert (entry.kind, entry.residual, entry.rank) == ("residual", True, 8)
    assert entry.parameters == shortcut.parameters == 2 * shortcut.hidden_size * 9 + 3
    np.testing.assert_array_equal(np.float32(entry.gates), shortcut.gates)
    exit_head = next(graph for graph in model.manifest.graphs if graph.name == "exit_head")
    assert [port.name for port in exit_head.inputs] == ["hidden", "blocks_run"]
    # The LM head is not stored twice: the exit head refers to the final head's file.
    size = (result.bundle / "graphs" / "exit_head.bin").stat().st_size
    assert size < 4 * 1.2 * shortcut.parameters
    done = model.generate(["def main(", "import "], exit=2, max_new_tokens=4)
    assert all(len(each.token_ids) == 4 for each in done.prompts)
    shown = CliRunner().invoke(app, ["inspect", str(result.bundle)])
    assert "residual, rank 8" in shown.stdout
    assert "gates" in shown.stdout


def test_the_same_build_gives_the_same_shortcut(residual, options):
    bundle = build(options(shortcut="residual")).bundle
    for name in (SHORTCUT, "graphs/exit_head.bin"):
        assert (bundle / name).read_bytes() == (residual.bundle / name).read_bytes()


def test_default_is_the_better_kind_as_measured(options):
    bundle = build(options(shortcut=None)).bundle
    report = report_of(bundle)
    ojfa, residual = (
        np.mean([getattr(row, kind).precision_at_1 for row in report.exits])
        for kind in ("ojfa", "residual")
    )
    if residual != ojfa:
        assert report.kind == ("residual" if residual > ojfa else "ojfa")
    assert f"Chosen: {report.kind}" in report.reason
    assert report.kind == load(bundle / SHORTCUT)[0].kind
    assert report.parameters_multi_jump == 3 * 2 * report.hidden_size * (report.rank + 1)


@pytest.fixture(scope="module")
def given(tiny_checkpoint, tmp_path_factory):
    """The file of an MLP shortcut of the tiny model."""
    checkpoint = Checkpoint(tiny_checkpoint)
    path = tmp_path_factory.mktemp("given") / "mlp.safetensors"
    save(random_mlp(checkpoint.spec, 24), path, checkpoint.sha256())
    return path


def test_a_given_shortcut_is_built_in_measured_and_verified(given, options):
    result = build(options(shortcut=given, rank=None, skip_verification=False))
    bundle, report = result.bundle, report_of(result.bundle)
    assert all(check.passed for check in result.report.checks)
    assert any("exit_head" in check.name for check in result.report.checks)
    shortcut, _ = load(bundle / SHORTCUT)
    assert (bundle / SHORTCUT).read_bytes() == given.read_bytes()
    entry = ojfa_export.load(bundle).manifest.shortcut
    assert (entry.kind, entry.width, entry.rank, entry.residual) == ("mlp", 24, None, True)
    assert entry.parameters == shortcut.parameters == report.parameters
    assert report.measured == ["identity", "given"]
    assert (report.tokens_fitted, report.precision_at_1) == (0, [])
    assert str(given) in report.reason
    assert report.agreement == [row.given.precision_at_1 for row in report.exits]
    assert f"{report.agreement[0]:.0%} after 1, " in result.summary()
    page = (bundle / "report" / "report.html").read_text(encoding="utf-8")
    assert "one MLP of 24 features for all exits" in page
    assert "Choice of the level" not in page
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert "one MLP for all exits, 24 features" in shown.stdout


def test_a_given_low_rank_shortcut_is_the_one_that_was_calibrated(residual, options):
    bundle = build(options(shortcut=residual.bundle / SHORTCUT, rank=None)).bundle
    for name in (SHORTCUT, "graphs/exit_head.bin"):
        assert (bundle / name).read_bytes() == (residual.bundle / name).read_bytes()
    given, fitted = (report_of(each).exits for each in (bundle, residual.bundle))
    assert [row.given for row in given] == [row.residual for row in fitted]


def test_a_shortcut_that_cannot_be_used_is_refused(given, options, tmp_path):
    with pytest.raises(UsageError, match="rank 8 is given, and a shortcut that exists"):
        build(options(shortcut=given, rank=8))
    with pytest.raises(UsageError, match="is a shortcut already"):
        parts.calibrate_only(options(shortcut=given, rank=None, output=tmp_path / "s"), SILENT)
    with pytest.raises(OjfaError, match="can't be read as a shortcut"):
        build(options(shortcut=tmp_path / "none.safetensors", rank=None))
    shortcut, sha256 = load(given)
    other = tmp_path / "other.safetensors"
    save(shortcut, other, "0" * 64)
    with pytest.raises(OjfaError, match="a shortcut of another model"):
        build(options(shortcut=other, rank=None))
    save(replace(shortcut, epsilon=0.5), other, sha256)
    with pytest.raises(OjfaError, match=r"doesn't fit .*its epsilon is 0.5"):
        build(options(shortcut=other, rank=None))
    assert not any(path.suffix == ".ojfa" for path in tmp_path.iterdir())


def test_without_torch_the_narrow_jump_ships_and_the_report_says_so(options, monkeypatch):
    monkeypatch.setattr(calibrate, "has_torch", lambda: False)
    report = report_of(build(options(shortcut=None)).bundle)
    assert report.kind == "ojfa"
    assert report.exits[0].residual is None
    assert "torch" in report.reason
    with pytest.raises(OjfaError, match="torch") as caught:
        build(options(shortcut="residual", overwrite=True))
    assert "--shortcut ojfa" in caught.value.hint


def test_unknown_kind_is_refused(options):
    with pytest.raises(UsageError, match=r"jtc.*can't be built"):
        build(options(shortcut="jtc"))


def test_exit_head_of_a_residual_shortcut_file(residual, options, tmp_path):
    """`calibrate` and `export` pass it on; the graph is the one that `build` writes."""
    bundle = residual.bundle
    plain = options()
    exported = BuildOptions(checkpoint=plain.checkpoint, output=tmp_path / "graphs",
                            calibration_data=plain.calibration_data, calibration_tokens=1024,
                            max_cache_length=64)  # fmt: skip
    parts.export_only(exported, [bundle / SHORTCUT], ojfa_export.system.progress.SILENT)
    for name in ("exit_head.bin", "exit_head.onnx"):
        assert (tmp_path / "graphs" / name).read_bytes() == (bundle / "graphs" / name).read_bytes()
