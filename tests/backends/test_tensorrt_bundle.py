"""Bundles on the TensorRT backend: building, resuming, verifying, refusing, running out of memory.

Every test runs on the stand-ins, and with `-m gpu` on a GPU, on what tests.gpu.prepare made.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle.bundle_copy import BundleCopy
from click.testing import CliRunner
from gpu.cases import BUNDLES

import ojfa_export
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.entries import EngineSet
from ojfa_export.cli.app import app
from ojfa_export.compiler.add_engines import add_engines
from ojfa_export.errors import BackendError, BundleError, CalibrationError, VerificationError
from ojfa_export.planning.bench import bench_bundle
from ojfa_export.planning.plan import plan_bundle
from ojfa_export.runtime.session import Session
from ojfa_export.system.digest import sha256_file
from ojfa_export.system.progress import SILENT, Silent
from ojfa_export.verify.verify import verify_bundle

GPU = "gpu"
PROGRAM = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path

class Killing:
    count = 0
    @contextmanager
    def task(self, what, total, unit):
        yield self
    def advance(self, count=1):
        self.count += count
        if self.count >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

def run():
    from ojfa_export.compiler.add_engines import add_engines
    add_engines(Path(sys.argv[1]), "tensorrt", Killing())

if sys.argv[2] == "gpu":
    run()
else:
    from stand_in import stand_in_gpu
    with stand_in_gpu():
        run()
"""


@pytest.fixture(
    scope="module", params=["stand-in", pytest.param(GPU, marks=pytest.mark.gpu)], name="where"
)
def _where(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[str]:
    """Puts the stand-ins in place, unless it is for a GPU."""
    if request.param == GPU:
        if "OJFA_GPU_CASES" not in os.environ:
            pytest.skip("OJFA_GPU_CASES is not set")
        yield GPU
        return
    from stand_in import stand_in_gpu

    with pytest.MonkeyPatch.context() as patch, stand_in_gpu():
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield "stand-in"


@pytest.fixture(scope="module")
def made(where: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `gpu.prepare.make_bundles`."""
    if where == GPU:
        return Path(os.environ["OJFA_GPU_CASES"]) / BUNDLES
    from gpu.prepare import make_bundles

    folder = tmp_path_factory.mktemp("made")
    make_bundles(folder)
    return folder


@pytest.fixture(scope="module")
def built(made: Path, tmp_path_factory: Any) -> Path:
    """A bundle in fp16 with TensorRT's engines; not to be written to."""
    copy = BundleCopy(made / "fp16.ojfa", tmp_path_factory.mktemp("built") / "built.ojfa")
    add_engines(copy.directory, "tensorrt", SILENT)
    return copy.directory


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> BundleCopy:
    return BundleCopy(built, tmp_path / "copy.ojfa")


def api() -> Any:
    return importlib.import_module("ojfa_export.backends.tensorrt.api")


def engines_of(bundle: Path) -> EngineSet:
    return Bundle(bundle).engines("tensorrt")


def engine_file(bundle: Path) -> str:
    """The path in the bundle of one of the engines."""
    return next(name for name in Bundle(bundle).manifest.files if name.endswith(".engine"))


def change_file(copy: BundleCopy, name: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file, and what the manifest says of it."""
    path = copy.own(name)
    path.write_bytes(change(path.read_bytes()))
    entry = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    copy.edit_manifest(lambda fields: fields["files"].update({name: entry}), resign=True)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "blocks"])
def test_added_engines_are_verified_and_give_the_same_tokens(
    made: Path, name: str, tmp_path: Path
) -> None:
    copy = BundleCopy(made / f"{name}.ojfa", tmp_path / "added.ojfa")
    add_engines(copy.directory, "tensorrt", SILENT)
    checks = verify_bundle(copy.directory, None, "tensorrt", SILENT)
    assert [check.name for check in checks if not check.passed] == []
    names = {check.name for check in checks}
    qkv = "attention.qkv normed" if name in ("fp32", "blocks") else "attention.qkv"  # a Qwen3
    for block in range(4):
        for tensor in (qkv, "attention.mixed", "hidden"):
            assert f"float64 block_{block:02d}: {tensor}" in names
    half = name in ("fp16", "blocks")
    assert half == any(each.startswith("fp16 range block_03") for each in names)
    kinds = {Path(each).suffix for each in Bundle(copy.directory).manifest.files}
    assert (".engine" in kinds) == (name != "bf16")
    assert any(each.startswith("golden tokens") for each in names)
    checked = {each.partition(" ")[2] for each in names if each.startswith("float64 check_head")}
    behind = "behind exit" if name == "blocks" else "after"
    wanted = {f"check_head {behind} {exit}: logits" for exit in (1, 2)}
    assert (wanted <= checked) == (name != "fp16")
    assert ("float64 exit_block_01 at exit 2: hidden" in names) == (name == "blocks")


def test_engines_say_what_they_were_built_for(built: Path) -> None:
    built_with = engines_of(built).built_with
    assert set(built_with) == {
        *("tensorrt", "gpu", "compute capability", "driver", "cublas", "profiles")
    }
    assert "1 to 16 tokens" in built_with["profiles"]
    assert len(list((built / "engines" / "tensorrt").glob("*.engine"))) == 4


def test_inspect_shows_layers_where_polygraphy_is(built: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(built), "-v"]).stdout
    assert "1 to 16 tokens, best 1" in shown
    if importlib.util.find_spec("polygraphy") is None:
        assert "Layers of tensorrt\n" in shown
        assert "pip install" not in shown  # the reason alone
        assert "not shown  an engine's layers are shown by Polygraphy" in shown
        return
    for name in ("block.qkv-", "block.mlp-", "final_head-", "exit_head-"):
        assert f"Layers of {name}" in shown
    assert "MatrixMultiply" in shown or "Gemm" in shown


def test_a_build_that_was_killed_keeps_its_engines(
    made: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = BundleCopy(made / "fp16.ojfa", tmp_path / "killed.ojfa")
    before = {path: path.stat().st_ino for path in copy.directory.rglob("*") if path.is_file()}
    arguments = [sys.executable, "-c", PROGRAM, str(copy.directory), where]
    paths = [*map(str, (Path(__file__).parents[1], Path(__file__).parents[2]))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    }
    killed = subprocess.run(arguments, env=environment, check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert {p: p.stat().st_ino for p in copy.directory.rglob("*") if p.is_file()} == before
    left = tmp_path / "killed.ojfa.tensorrt.partial"
    kept = {path.name: path.stat().st_ino for path in left.rglob("*.engine")}
    assert 0 < len(kept) < 4
    names: list[str] = []
    right = api().build

    def counted(name: str, *arguments: Any, **named: Any) -> bytes:
        names.append(name)
        return bytes(right(name, *arguments, **named))

    monkeypatch.setattr(api(), "build", counted)
    add_engines(copy.directory, "tensorrt", SILENT)
    assert len(names) == 4 - len(kept)
    engines = {path.name: path.stat().st_ino for path in copy.directory.rglob("*.engine")}
    assert kept.items() <= engines.items()
    assert not left.exists()


def test_progress_counts_what_is_built(made: Path, tmp_path: Path) -> None:
    copy = BundleCopy(made / "fp32.ojfa", tmp_path / "counted.ojfa")
    tasks = []

    class Counting(Silent):
        def task(self, what: str, total: int, unit: str) -> Any:
            tasks.append((what, total, unit))
            return super().task(what, total, unit)

    add_engines(copy.directory, "tensorrt", Counting())
    # The kernels, two parts of a block, two heads.
    assert tasks[0] == ("building tensorrt engines", 5, "engines")


def test_an_fp16_overflow_is_named(made: Path, tmp_path: Path) -> None:
    """Its norm enlarged, a block's MLP goes beyond what fp16 holds."""
    copy = BundleCopy(made / "fp16.ojfa", tmp_path / "overflow.ojfa")
    enlarge(copy, "block_02", "mlp.norm.weight", 3000)
    with pytest.raises(VerificationError) as caught:
        add_engines(copy.directory, "tensorrt", SILENT)
    message = str(caught.value)
    assert message.startswith("fp16 overflows in block_02: mlp.inner reaches ")
    assert message.endswith("fp16 holds 65504")
    assert "--precision bf16 or fp32" in str(caught.value.hint)
    assert [engines.backend for engines in Bundle(copy.directory).manifest.engines] == [
        "onnxruntime"
    ]


def enlarge(copy: BundleCopy, graph: str, weight: str, factor: float) -> None:
    """Multiplies an fp32 weight."""
    onnx = pytest.importorskip("onnx")
    from ojfa_export.graphs.weights import references

    path = copy.directory / "graphs" / f"{graph}.onnx"
    ref = references(onnx.load(path, load_external_data=False))[weight]

    def change(data: bytes) -> bytes:
        values = np.frombuffer(data, np.uint8).copy()
        part = values[ref.offset : ref.offset + ref.length].view(np.float32)
        part *= factor
        return values.tobytes()

    change_file(copy, f"graphs/{ref.location}", change)


def build_from_checkpoint(
    made: Path, output: Path, checkpoint: Path, precision: str, weights: str | None = None
) -> Any:
    from ojfa_export.compiler import pipeline
    from ojfa_export.compiler.options import BuildOptions

    options = BuildOptions(
        str(checkpoint),
        output,
        backend="tensorrt",
        precision=precision,
        weights=weights,
        rank=7,
        shortcut="ojfa",
        calibration_data=(made / "text.txt",),
        calibration_tokens=1024,
        max_cache_length=96,
    )
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("matplotlib") is None:
            patch.setattr(pipeline, "write_report", lambda *_: None)
        return pipeline.build(options)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_checkpoint_is_built_straight_to_this_backend(
    made: Path, tmp_path: Path, precision: str
) -> None:
    output = tmp_path / "straight.ojfa"
    result = build_from_checkpoint(made, output, made / "checkpoint", precision)
    names = {check.name for check in result.report.checks}
    assert "float64 block_03: attention.mixed" in names
    if importlib.util.find_spec("torch") is not None:
        assert {"engine block_03", "graph block_03", "logits full depth"} <= names
    manifest = Bundle(output).manifest
    assert [engines.backend for engines in manifest.engines] == ["tensorrt"]
    assert manifest.golden
    assert manifest.precision == precision
    checks = verify_bundle(output, None, "tensorrt", SILENT)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("storage", "form"),
    [
        pytest.param("int4", "int4 in groups of 32 with zero points", marks=pytest.mark.slow),
        ("fp8", "fp8 in groups of 32"),
    ],
)
def test_quantised_weights_are_built_straight_to_this_backend(
    made: Path, tmp_path: Path, storage: str, form: str
) -> None:
    """No engine is built; what runs is within fp16's rounding of what the numbers stand for."""
    output = tmp_path / "quantised.ojfa"
    result = build_from_checkpoint(made, output, made / "checkpoint", "fp16", storage)
    assert {"quantised block_03: steps", "float64 block_03: attention.mixed"} <= {
        check.name for check in result.report.checks
    }
    manifest = Bundle(output).manifest
    assert str(manifest.weights) == form
    assert ".engine" not in {Path(name).suffix for name in manifest.files}
    checks = verify_bundle(output, None, "tensorrt", SILENT)
    assert [check.name for check in checks if not check.passed] == []
    shown = CliRunner().invoke(app, ["inspect", str(output)]).stdout
    assert "kept wider" in shown
    assert "whole groups" not in shown  # the exit head's own matrix stays in fp16
    with pytest.raises(BackendError, match="which the onnxruntime backend doesn't run"):
        add_engines(output, "onnxruntime", SILENT)


def test_an_overflow_while_building_is_named(made: Path, tmp_path: Path) -> None:
    """By calibration where the engines overflow; else by verification: stand-ins don't."""
    safetensors = pytest.importorskip("safetensors.numpy")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in (made / "checkpoint").iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    weights = safetensors.load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 3000
    safetensors.save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    either = (CalibrationError, VerificationError)
    with pytest.raises(either, match=r"fp16 overflows in block_01.*: mlp\.inner reaches"):
        build_from_checkpoint(made, tmp_path / "never.ojfa", checkpoint, "fp16")
    assert not (tmp_path / "never.ojfa").exists()


@pytest.mark.parametrize(
    ("field", "other"),
    [("gpu", "NVIDIA A10"), ("compute capability", "8.6"), ("tensorrt", "10.3.0")],
)
def test_engines_for_another_machine_are_refused_before_any_is_opened(
    copy: BundleCopy, field: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(fields: dict[str, Any]) -> None:
        for engines in fields["engines"]:
            if engines["backend"] == "tensorrt":
                engines["built_with"][field] = other

    copy.edit_manifest(change, resign=True)
    monkeypatch.setattr(api(), "deserialize", lambda *_: pytest.fail("an engine was opened"))
    with pytest.raises(BackendError, match=f"{field} {other}") as caught:
        ojfa_export.load(copy.directory, backend="tensorrt")
    assert "ojfa-export build BUNDLE --backend tensorrt" in str(caught.value.hint)


def test_a_damaged_engine_is_refused_by_its_digest(
    copy: BundleCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy.own(engine_file(copy.directory))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(api(), "deserialize", lambda *_: pytest.fail("an engine was opened"))
    with pytest.raises(BundleError, match=r"\.engine"):
        ojfa_export.load(copy.directory, backend="tensorrt")


def test_an_engine_that_tensorrt_refuses(copy: BundleCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest is right, it was cut before the manifest was written."""
    monkeypatch.setenv("OJFA_DECODE", "engines")
    change_file(copy, engine_file(copy.directory), lambda data: data[: len(data) // 2])
    session = ojfa_export.load(copy.directory, backend="tensorrt").session(1, 32)
    with pytest.raises(BackendError, match="can't open engine") as caught:
        session.advance(list(range(1, 20)))  # more than kernels take
    assert "\n" not in str(caught.value)


def test_an_engine_that_the_manifest_does_not_name(copy: BundleCopy) -> None:
    (copy.directory / "engines" / "tensorrt" / "more.engine").write_bytes(b"anything")
    with pytest.raises(BundleError, match=r"holds 'engines/tensorrt/more\.engine'"):
        ojfa_export.load(copy.directory, backend="tensorrt")


def test_a_plan_that_names_an_engine_beside_the_manifest(copy: BundleCopy) -> None:
    name = engines_of(copy.directory).files["final_head"]
    change_file(copy, name, lambda data: data.replace(b"final_head-", b"other_head-"))
    with pytest.raises(BundleError, match=r"names 'other_head-.*which the bundle doesn't hold"):
        ojfa_export.load(copy.directory, backend="tensorrt")


def test_a_request_that_does_not_fit_says_what_would(built: Path, where: str) -> None:
    model = ojfa_export.load(built, backend="tensorrt")
    device = model.engines.device
    gc.collect()
    length, leaving = (65536, 1 << 30) if where == GPU else (8192, 320 << 20)
    held = fill(device, leaving, where)
    try:
        session = Session(model.spec, model.engines, 256, length)
        with pytest.raises(BackendError) as caught:
            session.advance([[1, 2, 3]] * 256)
        assert f"blocks with a cache of 256 x {length} tokens take" in str(caught.value)
        assert "are free: weights" in str(caught.value)
        # What it says would fit does.
        words = str(caught.value.hint).split("this would fit: ")[1].split("a cache of ")[1].split()
        smaller = Session(model.spec, model.engines, 256, int(words[0]))
        assert np.isfinite(smaller.advance([[1, 2, 3]] * 256)).all()
    finally:
        held.clear()


def fill(device: Any, leaving: int, where: str) -> list[Any]:
    """Takes device memory until so much is left."""
    if where != GPU:
        driver: Any = sys.modules["cuda.bindings.driver"]
        driver.total = driver.used + leaving
        return []
    module = importlib.import_module("ojfa_export.backends.cuda.device")
    held = []
    while (spare := device.available() - leaving) > (4 << 20):
        held.append(module.Memory(device, min(spare, 1 << 34), pooled=False))
    return held


def test_an_allocation_that_fails_says_how_much_is_free(built: Path) -> None:
    model = ojfa_export.load(built, backend="tensorrt")
    with pytest.raises(BackendError, match=r"free, and .* more are needed"):
        model.engines.arrays.lasting((1 << 44,), np.uint8)


def test_bench_and_plan_measure_the_device(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ojfa_export.planning.plan.SECONDS", 0)
    result = bench_bundle(built, [1, 4], 16, 1, 8, SILENT, "tensorrt")
    assert result.machine["device"]["gpu"] == engines_of(built).built_with["gpu"]
    assert result.machine["bandwidth_bytes_per_second"] > 0
    plan = plan_bundle(built, SILENT, backend="tensorrt")
    assert plan.machine["device"]["tensorrt"]
    if importlib.util.find_spec("onnxruntime") is not None:  # which widens fp16
        by_cpu = bench_bundle(built, [4], 16, 1, 8, SILENT)
        assert "device" not in by_cpu.machine
        assert by_cpu.exits[0].bytes_touched == 2 * result.exits[1].bytes_touched
