"""Sessions on ONNX Runtime's CUDA provider, all on one stream."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.onnxruntime.session import session_options
from ojfa_export.backends.onnxruntime_cuda.plan import NAME
from ojfa_export.errors import BackendError

PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
INSTALL = (
    "pip install 'ojfa-export[gpu-onnxruntime]', then put onnxruntime-gpu in the place of "
    "onnxruntime: 'pip uninstall -y onnxruntime', 'pip install --force-reinstall --no-deps "
    "onnxruntime-gpu'"
)
Array = DeviceArray | NDArray[Any]


@cache
def check_provider() -> None:
    """Makes sure that the installed ONNX Runtime was built for CUDA, and finds its libraries.

    Raises:
        BackendError: It wasn't.
    """
    if PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"ONNX Runtime {ort.__version__} as installed here has no CUDA provider", hint=INSTALL
        )
    # Its flash attention takes less time than its XQA kernels (bench/NOTES.md), and is what the
    # tests on a GPU run, as XQA takes no small heads. Read where sessions are opened.
    os.environ.setdefault("ORT_ENABLE_XQA", "0")
    # It warns at every session that it looked for a plugin of this name before its own provider.
    ort.set_default_logger_severity(3)
    if hasattr(ort, "preload_dlls"):
        # Finds CUDA's libraries where pip installs them; prints what it doesn't find, which other
        # places may have.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def open_session(model: bytes, name: str, stream: int) -> ort.InferenceSession:
    """Opens a graph on the CUDA provider, with nothing left to the CPU.

    Args:
        model: The serialised graph.
        name: For messages.
        stream: What its kernels are put on.

    Raises:
        BackendError: ONNX Runtime refuses the graph, or the provider doesn't load.
    """
    check_provider()
    options = session_options()
    # Memory is taken in the same places in every run, so that a recording stays valid.
    options.enable_mem_pattern = False
    provider = {
        "device_id": "0",
        "user_compute_stream": str(stream),
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    try:
        session = ort.InferenceSession(
            model, options, providers=[(PROVIDER, provider)], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't open '{name}': {str(error).splitlines()[0]}",
            hint="the engines may be of another version: rebuild them with "
            f"'ojfa-export build BUNDLE --backend {NAME}'",
        ) from error
    if PROVIDER not in session.get_providers():
        raise BackendError(
            f"the CUDA provider of ONNX Runtime {ort.__version__} doesn't load: libraries of CUDA "
            "or cuDNN are missing (ONNX Runtime names the first), or the driver is too old",
            hint=INSTALL,
        )
    return session


class Work:
    """A graph with its inputs and outputs in their places, ready to be put on the stream.

    Args:
        name: For messages.
        session: Of the graph.
        inputs: By name; more than the graph takes may be given.
        outputs: By name. One in the memory of an input is updated in place.
    """

    def __init__(
        self,
        name: str,
        session: ort.InferenceSession,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
    ) -> None:
        self._name, self._session = name, session
        self._binding = session.io_binding()
        # What is bound is an address: the arrays must live as long.
        self._held = (inputs, outputs)
        for each in session.get_inputs():
            self._binding.bind_input(each.name, *_place(inputs[each.name]))
        for each in session.get_outputs():
            self._binding.bind_output(each.name, *_place(outputs[each.name]))

    def run(self) -> None:
        """Puts it on the stream, without waiting for it.

        Raises:
            BackendError: ONNX Runtime can't run it; there may be no memory for what is between its
                operators.
        """
        try:
            self._session.run_with_iobinding(self._binding, _without_waiting())
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            raise BackendError(
                f"ONNX Runtime {ort.__version__} can't run '{self._name}': "
                f"{str(error).splitlines()[0]}",
                hint="where memory ran out: fewer sequences, or a shorter cache (max_length)",
            ) from error


def _place(array: Array) -> tuple[str, int, Any, tuple[int, ...], int]:
    if isinstance(array, DeviceArray):
        return DEVICE, 0, array.dtype.type, array.shape, array.pointer
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


@cache
def _without_waiting() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
