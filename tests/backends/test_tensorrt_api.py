"""The TensorRT calls against the names of published bindings, without the libraries.

tensorrt_surface/ holds what the compiled Python bindings of each version offer: the members of the
module and of its classes, read from the bindings themselves. A module is faked from these names
alone, in which anything else is an AttributeError, and every function of api.py is run in it.
"""

from __future__ import annotations

import ast
import enum
import importlib
import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ojfa_export.errors import BackendError

SURFACES = sorted((Path(__file__).parent / "tensorrt_surface").glob("*.json"))
ENUMS = (
    "BuilderFlag",
    "ExecutionContextAllocationStrategy",
    "LayerInformationFormat",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TacticSource",
)
# What calls give, where not a plain value: class.member -> class or value.
GIVES: dict[str, Any] = {
    "Builder.create_network": "INetworkDefinition",
    "Builder.create_builder_config": "IBuilderConfig",
    "Builder.create_optimization_profile": "IOptimizationProfile",
    "Builder.build_serialized_network": b"plan",
    "IBuilderConfig.create_timing_cache": "ITimingCache",
    "IBuilderConfig.get_tactic_sources": 0b1111,
    "ITimingCache.serialize": b"times",
    "INetworkDefinition.get_layer": "ILayer",
    "ILayer.get_output": "ITensor",
    "OnnxParser.parse": True,
    "Runtime.deserialize_cuda_engine": "ICudaEngine",
    "ICudaEngine.create_engine_inspector": "EngineInspector",
    "EngineInspector.get_engine_information": 86,  # for its words
    "ICudaEngine.create_execution_context": "IExecutionContext",
    "ICudaEngine.create_execution_context_without_device_memory": "IExecutionContext",
}
VALUES = {
    "INetworkDefinition.num_layers": 1,
    "ILayer.num_outputs": 1,
    "ICudaEngine.device_memory_size": 4096,
    "ICudaEngine.device_memory_size_v2": 8192,
}


class Fake:
    """An object of one class of the bindings; remembers what was called and set."""

    def __init__(self, module: FakeTensorRt, kind: str) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_kind", kind)

    def __getattr__(self, name: str) -> Any:
        member = self._module.require(self._kind, name)
        if member in VALUES:
            return VALUES[member]
        if member == "ILayer.type":
            return self._module.LayerType.MATRIX_MULTIPLY
        if member == "ITensor.dtype":
            return self._module.float32

        def call(*arguments: Any, **named: Any) -> Any:
            self._module.calls.append((member, arguments))
            if member == "ILayer.get_input" and arguments == (1,):
                return types.SimpleNamespace(dtype=self._module.input_dtype)
            given = GIVES.get(member)
            return Fake(self._module, given) if isinstance(given, str) else given

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._module.calls.append((self._module.require(self._kind, name), (value,)))


class FakeTensorRt(types.ModuleType):
    """A module `tensorrt` with the recorded names and no others."""

    def __init__(self, surface: dict[str, Any]) -> None:
        super().__init__("tensorrt")
        self.names = {kind: set(names) for kind, names in surface["names"].items()}
        self.calls: list[tuple[str, Any]] = []
        self.input_dtype = "float16"  # of a matrix product's weights
        self.__version__ = surface["version"]
        logger = type("ILogger", (), {})
        logger.Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")  # type: ignore[attr-defined]
        for kind in ENUMS:
            if kind in self.names:
                members = sorted(self.names[kind] - {"name", "value"})
                setattr(self, kind, enum.IntEnum(kind, members, start=0))
        self.require("", "ILogger")
        self.ILogger = logger
        for kind in ("Builder", "OnnxParser", "Runtime"):
            self.require("", kind)
            setattr(self, kind, lambda *_, kind=kind: Fake(self, kind))
        for name in ("float32", "float16"):
            self.require("", name)
            setattr(self, name, name)

    def require(self, kind: str, name: str) -> str:
        if name not in self.names[kind]:
            raise AttributeError(f"TensorRT {self.__version__} has no {kind}.{name}")
        return f"{kind}.{name}"


@pytest.fixture(params=SURFACES, ids=lambda path: path.stem)
def bindings(request, monkeypatch):
    """api.py imported over a fake of one version's bindings."""
    fake = FakeTensorRt(json.loads(request.param.read_text()))
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.delitem(sys.modules, "ojfa_export.backends.tensorrt.api", raising=False)
    api = importlib.import_module("ojfa_export.backends.tensorrt.api")
    yield fake, api
    sys.modules.pop("ojfa_export.backends.tensorrt.api", None)


def called(fake: FakeTensorRt, member: str) -> list[Any]:
    return [arguments for name, arguments in fake.calls if name == member]


@pytest.mark.parametrize(
    ("half", "inputs"), [(True, "float16"), (True, "float32"), (False, "float32")]
)
def test_building(bindings, tmp_path, half, inputs):
    """A product with fp32 weights, as of the exit head's projection, stays in fp32."""
    fake, api = bindings
    fake.input_dtype = inputs
    cache = tmp_path / "timing"
    profile = {"hidden": ((1, 8), (1, 8), (16, 8))}
    assert api.build("block", b"model", [profile], half=half, timing_cache=cache) == b"plan"
    assert cache.read_bytes() == b"times"
    [(flags,)] = called(fake, "Builder.create_network")
    typed = hasattr(fake.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    assert typed == (fake.__version__ != "8.6.0")
    wanted = "STRONGLY_TYPED" if typed else "EXPLICIT_BATCH"
    assert flags == 1 << fake.NetworkDefinitionCreationFlag[wanted]
    chosen = called(fake, "ILayer.precision")
    assert chosen == ([(inputs,)] if half and not typed else [])
    for (sources,) in called(fake, "IBuilderConfig.set_tactic_sources"):
        assert not sources & 1 << fake.TacticSource.CUDNN


def test_builds_at_the_same_time_share_the_timing_cache(bindings, tmp_path):
    _, api = bindings
    cache = tmp_path / "timing"

    def build(_: int) -> bytes:
        return api.build("block", b"model", [], half=False, timing_cache=cache)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(build, range(200))) == {b"plan"}
    assert [each.name for each in tmp_path.iterdir()] == ["timing"]


def test_opening_and_running(bindings):
    fake, api = bindings
    engine = api.deserialize("block", b"plan")
    older = fake.__version__ == "8.6.0"
    assert api.activation_bytes(engine) == (4096 if older else 8192)
    context = api.create_context(engine, 1, 0)
    assert len(called(fake, "ICudaEngine.create_execution_context")) == (not older)
    api.set_activations(context, 256, 4096)
    if older:
        assert called(fake, "IExecutionContext.device_memory") == [(256,)]
    else:
        assert called(fake, "IExecutionContext.set_device_memory") == [(256, 4096)]
    assert api.layers(engine) == "86"
    # What engine.py calls on a context.
    for name in ("set_input_shape", "set_tensor_address", "execute_async_v3"):
        fake.require("IExecutionContext", name)


def test_refusals_name_the_engine(bindings, monkeypatch, tmp_path):
    _, api = bindings
    api.LOG.log(api.trt.ILogger.Severity.ERROR, "out of memory")
    monkeypatch.setitem(GIVES, "Builder.build_serialized_network", None)
    with pytest.raises(BackendError, match=r"can't build 'block\.mlp': out of memory"):
        api.build("block.mlp", b"", [], half=False, timing_cache=tmp_path / "timing")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(GIVES, "Runtime.deserialize_cuda_engine", None)
    with pytest.raises(BackendError, match=r"can't open engine 'block\.mlp'"):
        api.deserialize("block.mlp", b"")


# What api.py names and a version lacks: each stands behind a question whether the library has it.
ABSENT = {
    "8.6.0": {"ExecutionContextAllocationStrategy", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"},
    "10.16.1": set(),
    "11.4.0": {
        "BuilderFlag.FP16",
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS",
        "TacticSource.CUDNN",
    },
}


def named_in_source() -> set[str]:
    """Every `trt.Class` and `trt.Class.member` in api.py, and what it asks for by a string."""
    source = Path("ojfa_export/backends/tensorrt/api.py")
    tree = ast.parse((Path(__file__).parents[2] / source).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Attribute(ast.Name("trt"), kind), member):
                found.add(f"{kind}.{member}")
            case ast.Attribute(ast.Name("trt"), kind):
                found.add(kind)
            case ast.Call(ast.Name("getattr" | "hasattr"), [of, ast.Constant(member), *_]):
                if ast.unparse(of).startswith("trt"):
                    found.add(".".join([*ast.unparse(of).split(".")[1:], member]))
    return found


@pytest.mark.parametrize("path", SURFACES, ids=lambda path: path.stem)
def test_every_name_in_the_source_is_in_the_bindings(path: Path) -> None:
    names = json.loads(path.read_text())["names"]
    used = named_in_source()
    assert {"Builder", "OnnxParser", "Runtime", "BuilderFlag.TF32"} <= used
    lacking = set()
    for name in used:
        kind, _, member = name.rpartition(".")
        if member.startswith("__"):  # Python's own
            continue
        if member not in names.get(kind, ()):
            lacking.add(name)
    assert lacking == ABSENT[path.stem]
