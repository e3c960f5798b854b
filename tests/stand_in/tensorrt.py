"""A module `tensorrt` in the shape of 8.6's, whose engines run in ONNX Runtime."""

from __future__ import annotations

import enum
import hashlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx

from ojfa_export.backends.onnxruntime.session import open_session
from stand_in.driver import ALIGNMENT, Driver
from stand_in.kernels import view

MAGIC = b"stand-in engine "
ACTIVATION_BYTES = 4096
DTYPES = {1: np.float32, 10: np.float16}


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class Network:
    """What the parser fills: the graph; precision is in the graph's own types here."""

    num_layers = 0
    model = b""


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, _: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        self._network.model = model
        return True


class Config:
    """Builder settings; profiles are kept."""

    def __init__(self) -> None:
        self.profiles: list[dict[str, list[list[int]]]] = []

    def add_optimization_profile(self, profile: SimpleNamespace) -> None:
        self.profiles.append(profile.ranges)

    def create_timing_cache(self, _: bytes) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"times")

    def get_tactic_sources(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("set_", "clear_")):
            return lambda *_, **__: None
        raise AttributeError(name)


class Builder:
    """Serialises the graph and its profiles, with a digest that a damaged engine betrays.

    Attributes:
        built: Names of the graphs that engines were built of, in all builders.
    """

    built: ClassVar[list[str]] = []

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, _: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> SimpleNamespace:
        ranges: dict[str, list[list[int]]] = {}

        def set_shape(name: str, *shapes: tuple[int, ...]) -> None:
            ranges[name] = [list(shape) for shape in shapes]

        return SimpleNamespace(ranges=ranges, set_shape=set_shape)

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        Builder.built.append(onnx.ModelProto.FromString(network.model).graph.name)
        body = json.dumps(config.profiles).encode() + b"\n" + network.model
        return MAGIC + hashlib.sha256(body).digest() + body


class Runtime:
    def __init__(self, driver: Driver, logger: ILogger) -> None:
        self._driver, self._logger = driver, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        body = plan[len(MAGIC) + 32 :]
        if plan[: len(MAGIC) + 32] != MAGIC + hashlib.sha256(body).digest():
            self._logger.log(ILogger.Severity.ERROR, "the engine is damaged")
            return None
        profiles, _, model = body.partition(b"\n")
        return Engine(self._driver, json.loads(profiles), model)


class Engine:
    device_memory_size = ACTIVATION_BYTES

    def __init__(
        self, driver: Driver, profiles: list[dict[str, list[list[int]]]], model: bytes
    ) -> None:
        self.driver, self.profiles = driver, profiles
        self.session = open_session(model, "engine", Path())
        graph = onnx.ModelProto.FromString(model).graph
        self.inputs = {
            each.name: (
                DTYPES[each.type.tensor_type.elem_type],
                [dim.dim_value for dim in each.type.tensor_type.shape.dim],
            )
            for each in graph.input
        }
        self.output = graph.output[0].name

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


class Context:
    """Refuses what TensorRT refuses: shapes outside the profile, addresses that aren't aligned."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._driver = engine, engine.driver
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.device_memory = 0

    def set_optimization_profile_async(self, profile: int, _: int) -> bool:
        self._profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        least, _, most = self._engine.profiles[self._profile][name]
        inside = all(lo <= n <= hi for lo, n, hi in zip(least, shape, most, strict=True))
        assert inside, f"{name} {shape} is outside the profile"
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGNMENT == 0, f"{name} is not aligned"
        assert address, f"{name} has no address"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, _: int) -> bool:
        assert self.device_memory, "no memory for activations"
        self._driver.check_inside(self.device_memory, ACTIVATION_BYTES)
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        self._driver.put(lambda: self._run(addresses, shapes))
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        feeds = {
            name: view(addresses[name], dtype, *shapes.get(name, tuple(dims)))
            for name, (dtype, dims) in self._engine.inputs.items()
        }
        [result] = self._engine.session.run(None, feeds)
        self._driver.check_inside(addresses[self._engine.output], result.nbytes)
        view(addresses[self._engine.output], result.dtype, *result.shape)[:] = result


def make_tensorrt(driver: Driver) -> ModuleType:
    """The module, whose engines work in a driver's memory."""
    module = ModuleType("tensorrt")
    for name, value in {
        "__version__": "8.6.0",
        "ILogger": ILogger,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": partial(Runtime, driver),
        "NetworkDefinitionCreationFlag": enum.IntEnum("Flags", {"EXPLICIT_BATCH": 0}),
        "MemoryPoolType": enum.Enum("MemoryPoolType", "WORKSPACE"),
        "ProfilingVerbosity": enum.Enum("ProfilingVerbosity", "DETAILED"),
        "BuilderFlag": enum.Enum("BuilderFlag", "TF32 FP16 OBEY_PRECISION_CONSTRAINTS"),
        "LayerType": enum.Enum("LayerType", "CONSTANT CAST SHAPE SHUFFLE MATRIX_MULTIPLY"),
        "float32": "float32",
        "float16": "float16",
    }.items():
        setattr(module, name, value)
    return module
