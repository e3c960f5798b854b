"""Every TensorRT call that differs between 8.6, 10 and 11, chosen by what the library has.

- Precision: in 8.6 by flags and constraints on layers; from 10 by the graph's own types
  (STRONGLY_TYPED, the only way in 11).
- Batch: 8.6 must be told EXPLICIT_BATCH.
- A context without memory: `create_execution_context_without_device_memory` and `device_memory`
  in 8.6; the strategy USER_MANAGED and `set_device_memory` from 10.
- cuDNN as a source of tactics: to be left out in 8.6, gone in 11.

8.6.0 was run on a GPU. 10.16 and 11.4 were not: for them tests/backends/test_tensorrt_api.py shows
that every name used here is in their published bindings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorrt as trt

from ojfa_export.errors import BackendError
from ojfa_export.system.atomic import write_atomically

LEVEL = 2  # of optimisation: at 3 and above, 8.6 takes more than six minutes for a large block
WORKSPACE_BYTES = 2 << 30


class Log(trt.ILogger):  # type: ignore[misc]  # the package has no types
    """Keeps TensorRT's errors for our own messages; nothing is printed."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Takes a message."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(message)

    def take(self) -> str:
        """The first error since the last call: those after it are mostly its consequences."""
        first, self.errors = (self.errors or ["no reason was given"])[0], []
        return first


LOG = Log()
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def version() -> str:
    """The library's version."""
    return str(trt.__version__)


def settings() -> dict[str, Any]:
    """What an engine depends on beside its graph, its profiles and the GPU."""
    return {"tensorrt": version(), "level": LEVEL, "workspace": WORKSPACE_BYTES}


def build(
    name: str, model: bytes, profiles: list[Profile], *, half: bool, timing_cache: Path
) -> bytes:
    """Builds an engine.

    Args:
        name: For messages.
        model: An ONNX graph of opset 17 at most: with 18 and later, 8.6 reduces over wrong axes
            without saying so.
        profiles: Ranges of the inputs' shapes (least, best, most) by input; the engine has one
            optimisation profile for each.
        half: Whether matrix products are in fp16.
        timing_cache: File that measured times are kept in from one build to the next.

    Raises:
        BackendError: TensorRT can't build it.
    """
    builder = trt.Builder(LOG)
    network = builder.create_network(_network_flags())
    parser = trt.OnnxParser(network, LOG)
    if not parser.parse(model):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BackendError(f"TensorRT {version()} can't read graph '{name}': {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.builder_optimization_level = LEVEL
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for `inspect -v`
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0  # one stream, in whose order memory is reused
    _leave_out_cudnn(config)
    _set_precision(network, config, half=half)
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for tensor, (least, best, most) in ranges.items():
            profile.set_shape(tensor, least, best, most)
        config.add_optimization_profile(profile)
    known = timing_cache.read_bytes() if timing_cache.exists() else b""
    times = config.create_timing_cache(known) or config.create_timing_cache(b"")
    config.set_timing_cache(times, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(
            f"TensorRT {version()} can't build '{name}': {LOG.take()}",
            hint="free GPU memory helps where it ran out; else please report this",
        )
    write_atomically(timing_cache, bytes(times.serialize()))  # others may be building as well
    return bytes(plan)


def _network_flags() -> int:
    flags = trt.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED"):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


def _leave_out_cudnn(config: Any) -> None:
    """Where the library may use cuDNN it asks for a version that few machines have."""
    source = getattr(trt.TacticSource, "CUDNN", None) if hasattr(trt, "TacticSource") else None
    if source is not None:
        config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(source)))


def _set_precision(network: Any, config: Any, *, half: bool) -> None:
    """Matrix products in fp16, everything else in fp32, where the graph's types don't decide."""
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not half:
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    kinds = trt.LayerType
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in (kinds.CONSTANT, kinds.CAST, kinds.SHAPE, kinds.SHUFFLE):
            continue
        if layer.get_output(0).dtype not in (trt.float32, trt.float16):
            continue
        # By the weights: the exit head's projection is in fp32 in fp16 bundles too. (What was cast
        # to fp16 before still says fp32 here.)
        product = layer.type == kinds.MATRIX_MULTIPLY
        half_weights = product and layer.get_input(1).dtype == trt.float16
        kind = trt.float16 if half_weights else trt.float32
        layer.precision = kind
        for output in range(layer.num_outputs):
            layer.set_output_type(output, kind)


def deserialize(name: str, plan: bytes) -> Any:
    """Opens an engine, whose digest the caller has checked.

    Raises:
        BackendError: TensorRT refuses it.
    """
    engine = trt.Runtime(LOG).deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"TensorRT {version()} can't open engine '{name}': {LOG.take()}",
            hint="rebuild the engines with 'ojfa-export build BUNDLE --backend tensorrt'",
        )
    return engine


def layers(engine: Any) -> str:
    """An engine's layers in TensorRT's own words, one a line."""
    form = trt.LayerInformationFormat.ONELINE
    return str(engine.create_engine_inspector().get_engine_information(form))


def failure(name: str, free: str) -> BackendError:
    """What to raise where an engine doesn't run, with so much GPU memory free."""
    return BackendError(
        f"TensorRT {version()} can't run engine '{name}': {LOG.take()}",
        hint=f"{free} of GPU memory are free; where that is little, free some: TensorRT loads its "
        "kernels when they are first used",
    )


def activation_bytes(engine: Any) -> int:
    """Memory that a context of the engine needs while it runs."""
    newer = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if newer is None else newer)


def create_context(engine: Any, profile: int, stream: int) -> Any:
    """A context for one profile, without memory of its own: see `set_activations`."""
    strategies = getattr(trt, "ExecutionContextAllocationStrategy", None)
    if strategies is None:
        context = engine.create_execution_context_without_device_memory()
    else:
        context = engine.create_execution_context(strategies.USER_MANAGED)
    context.set_optimization_profile_async(profile, stream)
    return context


def set_activations(context: Any, pointer: int, size: int) -> None:
    """Gives a context the memory that it works in; contexts of one stream may share it."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(pointer, size)
    else:
        context.device_memory = pointer
