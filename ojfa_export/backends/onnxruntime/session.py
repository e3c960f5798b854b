"""ONNX Runtime sessions that share one thread pool."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from ojfa_export.backends.onnxruntime.threads import default_threads
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.onnx_file import read_onnx
from ojfa_export.errors import BackendError, OjfaError


@cache
def share_thread_pool() -> int:
    """Makes one thread pool for every session of the process, once.

    A chain of sessions with a pool each would leave the threads of the last block spinning on the
    cores that the next block needs: measured five to eight times slower (bench/NOTES.md).

    Returns:
        The number of threads.
    """
    threads = default_threads()
    # Where the application has made the process's pool, its sessions and these share that one.
    with suppress(Fail):
        ort.set_global_thread_pool_sizes(threads, 1)
    return threads


@cache
def share_arena() -> None:
    """Makes one arena of scratch memory for the sessions of all models, once.

    A session keeps the arena that its largest run needed. Blocks run one after the other, so that
    one arena serves all of them, and stays in the processor's caches from block to block.
    """
    info = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    with suppress(Fail):  # the application has made one
        # By default an arena doubles whenever it grows; here it grows by what is asked for.
        ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def session_options() -> ort.SessionOptions:
    """Options of a session that uses the process's one thread pool and one arena."""
    share_thread_pool()
    share_arena()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return options


def open_session(
    model: bytes, name: str, weights: Path, files: Files = UNCHECKED
) -> ort.InferenceSession:
    """Opens a graph on the CPU provider.

    Args:
        model: The serialised graph.
        name: For messages.
        weights: Directory of the weight files that the graph refers to; they are mapped, not
            copied.
        files: Makes sure of the weight files.

    Raises:
        BackendError: ONNX Runtime refuses the graph.
        BundleError: A weight file was changed since it was checked.
    """
    options = session_options()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights.resolve())
    )
    try:
        used = {weights / tensor.location for tensor in read_onnx(model).tensors.values()}
        with files.held(*used):
            return ort.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
    except OjfaError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't open '{name}': {str(error).splitlines()[0]}",
            hint="the engines may be of another version: rebuild them with "
            "'ojfa-export build BUNDLE --backend onnxruntime'",
        ) from error


def failure(name: str, error: Exception) -> BackendError:
    """What to tell of a graph that ONNX Runtime can't run.

    Args:
        name: The graph.
        error: What ONNX Runtime raised.
    """
    return BackendError(
        f"ONNX Runtime {ort.__version__} can't run '{name}': {str(error).splitlines()[0]}",
        hint="check the bundle with 'ojfa-export verify BUNDLE'",
    )
