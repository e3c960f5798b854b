"""What the doctor finds, with things missing and broken."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import onnx
import pytest
import tomllib

from ojfa_export import backends
from ojfa_export.backends import doctor
from ojfa_export.backends.onnxruntime import session as ort_session
from ojfa_export.errors import BackendError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_packages_are_those_of_the_project_file() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    declared = {"run": project["dependencies"], **project["optional-dependencies"]}
    for part, packages in doctor.PACKAGES.items():
        # tomli is only for Python 3.10, where the standard library has no TOML reader.
        needed = (
            item.partition(";")[0] for item in declared[part] if not item.startswith("tomli>")
        )
        wanted = dict(item.split(">=") for item in needed)
        assert packages == wanted


def test_embedded_model_is_valid() -> None:
    model = onnx.load_from_string(doctor._DOUBLING_MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_healthy(invoke) -> None:
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["backends"][0]["name"] == "onnxruntime"
    assert document["backends"][0]["works"] is True
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["memory_bytes"] > document["machine"]["available_bytes"] > 0
    result = invoke("doctor")
    assert result.exit_code == 0
    assert re.search(r"^  onnxruntime +works: version ", result.stdout, re.MULTILINE)
    assert re.search(r"^  tensorrt +(works: version |-: )", result.stdout, re.MULTILINE)
    assert re.search(r"^  onnxruntime-cuda +(works: version |-: )", result.stdout, re.MULTILINE)


def test_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        def versions(self) -> dict[str, str]:
            return {"tensorrt": "8.6.0", "gpu": "A GPU", "driver": "CUDA 13.0"}

    monkeypatch.setattr(backends, "load", lambda name: Found())
    state = doctor.try_tensorrt()
    assert (state.works, state.detail) == (True, "version 8.6.0 on A GPU, CUDA 13.0")
    found = {"tensorrt": "8.6.0", "gpu": "A GPU", "driver": "CUDA 13.0", "cublas": "none"}
    monkeypatch.setattr(Found, "versions", lambda self: found)
    state = doctor.try_tensorrt()
    assert state.works
    assert state.detail.endswith("no cuBLASLt: prompts are slower")
    assert state.hint is not None
    assert "pip install nvidia-cublas" in state.hint

    def missing(name: str) -> None:
        raise BackendError("no package", hint="see doctor") from ImportError(name)

    monkeypatch.setattr(backends, "load", missing)
    state = doctor.try_tensorrt()
    assert (state.works, state.hint) == (False, "pip install 'ojfa-export[gpu]'")


def test_onnxruntime_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise BackendError("no package", hint="see doctor") from ImportError(name)

    monkeypatch.setattr(backends, "load", missing)
    state = doctor.try_onnxruntime_cuda()
    assert (state.works, state.hint) == (False, "pip install 'ojfa-export[gpu-onnxruntime]'")

    class Found:
        def versions(self) -> dict[str, str]:
            return {"onnxruntime": "1.31.1", "gpu": "A GPU", "driver": "CUDA 13.0"}

    monkeypatch.setattr(backends, "load", lambda name: Found())
    monkeypatch.setattr(doctor, "_double_on_cuda", lambda value: 2 * value)
    state = doctor.try_onnxruntime_cuda()
    assert state.detail == "version 1.31.1 on A GPU, CUDA 13.0: ran a tiny model"
    assert state.works
    monkeypatch.setattr(doctor, "_double_on_cuda", lambda value: value)
    assert doctor.try_onnxruntime_cuda().works is False

    def broken(value: float) -> float:
        raise BackendError("the CUDA provider doesn't load", hint="install it")

    monkeypatch.setattr(doctor, "_double_on_cuda", broken)
    state = doctor.try_onnxruntime_cuda()
    assert (state.detail, state.hint) == ("the CUDA provider doesn't load", "install it")


def test_onnxruntime_gpu_stands_in_for_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(doctor, "version", version)
    package = doctor.look_at_package("onnxruntime", "run", "1.23")
    assert (package.version, package.hint) == ("1.31.1", None)


@pytest.mark.parametrize(
    ("found", "minimum", "too_old"),
    [("2.13.0+cpu", "2.4", False), ("2.3.9", "2.4", True), ("1.0rc1", "1.0", False),
     ("0.10", "0.9.1", False), ("0.9", "0.10", True)],
)  # fmt: skip
def test_old_package(
    monkeypatch: pytest.MonkeyPatch, found: str, minimum: str, too_old: bool
) -> None:
    monkeypatch.setattr(doctor, "version", lambda _: found)
    package = doctor.look_at_package("thing", "build", minimum)
    expected = f"pip install --upgrade 'thing>={minimum}'" if too_old else None
    assert (package.version, package.hint) == (found, expected)


def test_missing_package(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor.version

    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(doctor, "version", version)
    result = invoke("doctor")
    assert result.exit_code == 0  # torch is for verifying only
    line = next(line for line in result.stdout.splitlines() if line.startswith("  torch "))
    assert line.split(None, 1)[1] == (
        "not installed    needed to verify; pip install 'ojfa-export[verify]'"
    )


def test_missing_backend(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ojfa_export.backends.onnxruntime.session")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert re.search(r"^  onnxruntime +-: can't be imported: ", result.stdout, re.MULTILINE)
    assert "hint: pip install ojfa-export\n" in result.stdout
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["works"] is False


def test_broken_backend(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("illegal instruction\nand more")

    monkeypatch.setattr(ort_session, "open_session", broken)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "RuntimeError: illegal instruction\n" in result.stdout
    assert "hint: pip install --force-reinstall onnxruntime" in result.stdout


def test_wrong_thread_setting(invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OJFA_THREADS", "many")
    ort_session.share_thread_pool.cache_clear()
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "OJFA_THREADS must be a whole number from 1 to " in result.stdout
    assert "hint: for example OJFA_THREADS=" in result.stdout


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'A GPU, 81559 MiB, 550.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.look_at_machine().gpus == ["A GPU, 81559 MiB, 550.1"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.look_at_machine().gpus == []
