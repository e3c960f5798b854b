"""build, inspect, verify, bench, calibrate and export, on small real models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from ojfa_export.backends import doctor
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.cli.console import Console
from ojfa_export.verify.check import Check


def test_inspect_json_is_the_manifest_and_sizes(invoke, bundle: Path) -> None:
    document = json.loads(invoke("inspect", bundle, "--json").stdout)
    assert document.pop("bundle") == str(bundle)
    sizes = document.pop("sizes")
    assert document == json.loads((bundle / "manifest.json").read_text())
    on_disk = {
        path.relative_to(bundle).as_posix(): path.stat().st_size
        for path in bundle.rglob("*")
        if path.is_file()
    }
    assert sizes.pop("total") == sum(on_disk.values()) == sum(sizes.values())
    for kind in ("engines", "report"):
        inside = (size for name, size in on_disk.items() if name.startswith(f"{kind}/"))
        assert sizes[kind] == sum(inside)
    graphs = (size for name, size in on_disk.items() if name.startswith("graphs/"))
    assert sizes["graphs"] + sizes["weights"] == sum(graphs)


def test_inspect_describes_every_graph(invoke, bundle: Path) -> None:
    shown = invoke("inspect", bundle).stdout
    assert "block_00 to block_03 (4 alike)\n" in shown
    assert "  in  past_key float [batch, 2, past, 16]\n" in shown
    assert "rank 3, fitted after block " in shown
    assert "\x1b" not in shown  # plain where there is no terminal
    manifest = Bundle(bundle).manifest
    each = invoke("inspect", bundle, "-v").stdout
    for graph in manifest.graphs:
        assert f"\n{graph.name}" in each
    for name, entry in manifest.files.items():
        assert f"{entry.sha256}  {name}\n" in each


def test_inspect_refuses_an_altered_bundle(invoke, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy.ojfa")
    (copy / "tokenizer.json").write_text("{}")
    result = invoke("inspect", copy)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")


def test_verify_reproduces_golden_tokens(invoke, bundle: Path) -> None:
    result = invoke("verify", bundle, "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 0
    assert document["passed"] is True
    names = [check["name"] for check in document["checks"]]
    manifest = Bundle(bundle).manifest
    assert sum(name.startswith("golden tokens") for name in names) == len(manifest.golden)
    blocks = {f"float64 block_{index:02d}: hidden" for index in range(manifest.model.spec.blocks)}
    assert blocks <= set(names)


def _with_checks(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, float, float]) -> None:
    checks = [
        Check(name=name, max_abs_diff=diff, tolerance=tolerance, passed=diff <= tolerance)
        for name, diff, tolerance in rows
    ]
    monkeypatch.setattr("ojfa_export.verify.verify.open_model", lambda *_: None)
    monkeypatch.setattr("ojfa_export.verify.verify.verify_model", lambda *_, **__: checks)


def test_failed_verification_is_status_3(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_checks(monkeypatch, ("block_00", 1e-6, 1e-4), ("logits", 0.5, 1e-4))
    result = invoke("verify", "any")
    assert result.exit_code == 3
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert rows == [["block_00", "1e-06", "0.0001", "ok"], ["logits", "0.5", "0.0001", "FAILED"]]
    assert result.stderr == "1 of 2 checks failed\n"
    document = json.loads(invoke("verify", "any", "--json").stdout)
    assert document["passed"] is False
    assert [check["passed"] for check in document["checks"]] == [True, False]


def test_infinite_difference_is_null_in_json(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_checks(monkeypatch, ("logits", math.inf, 1e-4))
    result = invoke("verify", "any", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["checks"][0]["max_abs_diff"] is None


@pytest.mark.parametrize(("atol", "status"), [("1", 0), ("0.1", 3)])
def test_atol_replaces_tolerances(
    invoke, monkeypatch: pytest.MonkeyPatch, atol: str, status: int
) -> None:
    _with_checks(monkeypatch, ("logits", 0.5, 1e-4))
    assert invoke("verify", "any", "--atol", atol).exit_code == status


@pytest.mark.parametrize("atol", ["nan", "inf"])
def test_atol_must_be_a_number_that_can_fail(invoke, atol: str) -> None:
    result = invoke("verify", "any", "--atol", atol)
    assert result.exit_code == 2
    assert f"--atol must be a finite number, not {atol}" in result.stderr


def test_atol_does_not_excuse_other_tokens(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_checks(monkeypatch, ("golden tokens", 1, 0))
    assert invoke("verify", "any", "--atol", "5").exit_code == 3


def test_dry_run_writes_nothing(
    invoke, checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.ojfa"
    options = ("--dry-run", "--precision", "fp16", "--max-cache-length", 64,
               "--calibration-data", calibration_text)  # fmt: skip
    plan = json.loads(invoke("build", checkpoint, "-o", output, *options, "--json").stdout)
    assert plan["settings"]["precision"] == "fp16"
    assert plan["settings"]["max_cache_length"] == 64
    shown = invoke("build", checkpoint, "-o", output, *options)
    assert shown.stdout.startswith(f"Would build {output} from ")
    assert list(tmp_path.iterdir()) == []


def test_build_reports_stages(
    invoke, checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.ojfa"
    result = invoke("build", checkpoint, "-o", output, "--skip-verification", "--json",
                    "--calibration-data", calibration_text,
                    "--calibration-tokens", 4096, "--rank", 2)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["bundle"], document["blocks"], document["rank"]) == (str(output), 4, 2)
    assert all(stage["peak_memory_bytes"] > 0 for stage in document["stages"])
    assert "exporting graphs: 6/6 graphs" in result.stderr
    again = invoke("build", checkpoint, "-o", output, "--skip-verification")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_interrupted_build_says_how_to_go_on(
    invoke,
    checkpoint: Path,
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ojfa_export.compiler.shortcut_stage.run_calibration", interrupt)
    data = ("--calibration-data", calibration_text)
    result = invoke("build", checkpoint, "-o", tmp_path / "out.ojfa", "-q", *data)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == (
        "error: interrupted\nhint: run the same command again to go on where it stopped\n"
    )
    assert not (tmp_path / "out.ojfa").exists()


def test_build_adds_engines_to_a_bundle(invoke, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy.ojfa")
    result = invoke("build", copy, "--backend", "onnxruntime", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["backend"] == "onnxruntime"
    assert Bundle(copy).manifest.engines == Bundle(bundle).manifest.engines


@pytest.mark.parametrize("option", [("--rank", 2), ("--precision", "fp16"), ("--dry-run",)])
def test_settings_of_a_bundle_are_fixed(invoke, bundle: Path, option) -> None:
    result = invoke("build", bundle, *option)
    assert result.exit_code == 2
    assert f"error: {option[0]} can't be changed in a bundle that exists" in result.stderr


def test_calibrate_then_export(
    invoke, checkpoint: Path, calibration_text: Path, tmp_path: Path
) -> None:
    shortcut, report, graphs = (tmp_path / name for name in ("s.safetensors", "report", "graphs"))
    fitted = invoke("calibrate", checkpoint, "-o", shortcut, "--report", report, "--json",
                    "--calibration-data", calibration_text,
                    "--calibration-tokens", 4096, "--rank", 2)  # fmt: skip
    assert fitted.exit_code == 0, fitted.stderr
    assert json.loads(fitted.stdout)["rank"] == 2
    assert shortcut.is_file()
    assert (report / "report.json").is_file()
    exported = invoke("export", checkpoint, "-o", graphs, "--shortcut", shortcut, "--json")
    assert exported.exit_code == 0, exported.stderr
    assert "exit_head" in json.loads(exported.stdout)["graphs"]
    assert (graphs / "exit_head.onnx").is_file()


def test_bench_finds_out_at_once_that_it_can_t_write(invoke, tmp_path: Path) -> None:
    for output, reason in ((tmp_path / "none" / "a.json", "no such file"), (tmp_path, "directory")):
        result = invoke("bench", "any", "-o", output)  # before it looks for the bundle
        assert result.exit_code == 1
        assert f"can't use {tmp_path}" in result.stderr
        assert reason in result.stderr


def test_bench_measures_the_exits_asked_for(invoke, bundle: Path, tmp_path: Path) -> None:
    args = ("bench", bundle, "--prompt-length", 8, "--iterations", 2, "--warmup", 0,
            "--exit", "full", "--exit", 2, "-o", tmp_path / "bench.json")  # fmt: skip
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["blocks"] for row in document["exits"]] == [2, 4]
    assert json.loads((tmp_path / "bench.json").read_text()) == document
    table = invoke(*args).stdout.partition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in table] == ["exit", "2", "4"]


def test_what_libraries_print_is_kept_out_of_json(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor.diagnose

    def chatty() -> doctor.Diagnosis:
        print("a library's banner")
        return original()

    monkeypatch.setattr(doctor, "diagnose", chatty)
    result = invoke("doctor", "--json")
    assert json.loads(result.stdout)["works"] is True
    assert result.stderr == "a library's banner\n"


@pytest.mark.parametrize("args", [("--json", "doctor"), ("doctor", "--json")])
def test_common_options_are_taken_before_and_after_the_command(invoke, args) -> None:
    assert json.loads(invoke(*args).stdout)["works"] is True


def test_table_keeps_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(("a", "b"), [("[bold]", ":smile:"), ("x" * 300, "2")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["[bold]", ":smile:"]
    assert lines[2].split() == ["x" * 300, "2"]
