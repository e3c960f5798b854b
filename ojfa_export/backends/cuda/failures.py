"""What to do where a call of the CUDA driver fails, by the name of its status."""

from __future__ import annotations

from ojfa_export.errors import BackendError

REBUILD = "rebuild the engines with 'ojfa-export build BUNDLE --backend NAME'"
BROKEN = (
    "a kernel failed, and nothing runs on the GPU in this process any more: start it anew; if it "
    "happens again, please report it with what OJFA_DECODE=engines gives"
)
NO_CUBLAS = "pip install nvidia-cublas (driver of CUDA 13) or nvidia-cublas-cu12"
HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "use fewer sequences, a shorter cache, or an earlier fixed exit",
    "CUDA_ERROR_NO_DEVICE": "see 'ojfa-export doctor'; CUDA_VISIBLE_DEVICES may hide the GPU",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": REBUILD,
    "CUDA_ERROR_INVALID_IMAGE": REBUILD,
    "CUDA_ERROR_NOT_FOUND": REBUILD,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": REBUILD,
    "CUDA_ERROR_ILLEGAL_ADDRESS": BROKEN,
    "CUDA_ERROR_LAUNCH_FAILED": BROKEN,
    "CUDA_ERROR_MISALIGNED_ADDRESS": BROKEN,
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": BROKEN,
    "CUDA_ERROR_LAUNCH_TIMEOUT": "the GPU also drives a display: use another, or a smaller model",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated while it ran: restart the machine",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "the GPU's memory is faulty: reset or replace it",
}


def failure(status: str, detail: str, what: str | None = None) -> BackendError:
    """What to raise for a failed call.

    Args:
        status: Its name.
        detail: What the driver says of it.
        what: Was being done, if that helps.
    """
    doing = f"{what}: " if what else ""
    return BackendError(
        f"CUDA: {doing}{detail} ({status})",
        hint=HINTS.get(status, "'nvidia-smi' shows the GPU's state, 'ojfa-export doctor' the rest"),
    )
