"""What works on this machine, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ojfa_export.backends.cuda.failures import NO_CUBLAS
from ojfa_export.errors import OjfaError
from ojfa_export.system.memory import read_meminfo

# The least version of each package, and the part of the work that needs it; pyproject.toml says
# the same, and a test compares the two.
PACKAGES = {
    "run": {
        "click": "8.1",
        "numpy": "1.26",
        "onnxruntime": "1.32",
        "pydantic": "2.8",
        "rich": "13.7",
        "tokenizers": "0.20",
        "typing-extensions": "4.5",
    },
    "build": {
        "huggingface-hub": "0.26",
        "jinja2": "3.1.6",
        "matplotlib": "3.8",
        "ml-dtypes": "0.4",
        "onnx": "1.16",
        "safetensors": "0.4.5",
    },
    "verify": {"accelerate": "1.0", "torch": "2.4", "transformers": "4.56"},
}
INSTALL = {
    "run": "pip install ojfa-export",
    "build": "pip install 'ojfa-export[build]'",
    "verify": "pip install 'ojfa-export[verify]'",
    "gpu": "pip install 'ojfa-export[gpu]'",
    "gpu-onnxruntime": "pip install 'ojfa-export[gpu-onnxruntime]'",
}
# Packages that hold the same module as another.
STAND_INS = {"onnxruntime": "onnxruntime-gpu"}

# y = x + x for one float, so that a session can be tried without the onnx package. Made with
#   helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g",
#       [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
#       [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]),
#       opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
_DOUBLING_MODEL = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)

# Instruction sets that decide how fast matrix products are.
_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
             "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "bf16",
             "sve")  # fmt: skip


@dataclass(frozen=True)
class Package:
    """A package that some part of the work needs.

    Attributes:
        needed_for: "run", "build" or "verify".
        minimum: Least version.
        version: Installed version, or None.
        hint: What to do, where it is missing or too old.
    """

    name: str
    needed_for: str
    minimum: str
    version: str | None
    hint: str | None


@dataclass(frozen=True)
class BackendState:
    """Whether a backend works here.

    Attributes:
        detail: What was tried and found.
        hint: What to do, where it doesn't work.
    """

    name: str
    works: bool
    detail: str
    hint: str | None


@dataclass(frozen=True)
class Machine:
    """The machine.

    Attributes:
        cores: Cores that this process may use.
        memory_bytes: Of the machine; None where it isn't known.
        available_bytes: Of it, not in use.
        gpus: As nvidia-smi describes them.
    """

    python: str
    platform: str
    cpu: str
    cores: int
    features: list[str]
    memory_bytes: int | None
    available_bytes: int | None
    gpus: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        threads: The setting OJFA_THREADS, or None where it isn't set.
    """

    machine: Machine
    threads: str | None
    packages: list[Package]
    backends: list[BackendState]


def diagnose() -> Diagnosis:
    """Looks at everything. The first backend is the default one."""
    return Diagnosis(
        machine=look_at_machine(),
        threads=os.environ.get("OJFA_THREADS") or None,
        packages=[
            look_at_package(name, part, minimum)
            for part, packages in PACKAGES.items()
            for name, minimum in packages.items()
        ],
        backends=[try_onnxruntime(), try_tensorrt(), try_onnxruntime_cuda()],
    )


def look_at_package(name: str, needed_for: str, minimum: str) -> Package:
    """Finds a package's version, or that of one in its place, without importing it."""
    found = _version(name) or _version(STAND_INS.get(name, name))
    if found is None:
        return Package(name, needed_for, minimum, None, INSTALL[needed_for])
    old = _release(found) < _release(minimum)
    hint = f"pip install --upgrade '{name}>={minimum}'" if old else None
    return Package(name, needed_for, minimum, found, hint)


def try_onnxruntime() -> BackendState:
    """Runs a tiny model on ONNX Runtime's CPU provider."""
    name = "onnxruntime"
    try:
        import numpy as np
        import onnxruntime

        from ojfa_export.backends.onnxruntime.session import open_session, share_thread_pool

        session = open_session(_DOUBLING_MODEL, "doctor", Path())
        result = float(session.run(None, {"x": np.array([21], np.float32)})[0][0])
        threads = share_thread_pool()
    except ImportError as error:
        return BackendState(name, False, f"can't be imported: {error}", INSTALL["run"])
    except OjfaError as error:
        return BackendState(name, False, error.message, error.hint)
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        return BackendState(
            name,
            False,
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            "pip install --force-reinstall onnxruntime",
        )
    if result != 42:
        detail = f"a tiny model gave {result} for 42"
        return BackendState(name, False, detail, "pip install --force-reinstall onnxruntime")
    detail = f"version {onnxruntime.__version__}, CPU provider, {threads} threads: ran a tiny model"
    return BackendState(name, True, detail, None)


def look_at_machine() -> Machine:
    """Reads what the operating system says."""
    cpu, flags = _read_cpuinfo()
    memory = read_meminfo()
    return Machine(
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        cpu=cpu or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        features=[feature for feature in _FEATURES if feature in flags],
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        gpus=_list_gpus(),
    )


def try_tensorrt() -> BackendState:
    """Finds the GPU and TensorRT."""
    name = "tensorrt"
    try:
        from ojfa_export import backends

        versions = backends.load("tensorrt").versions()
    except OjfaError as error:
        missing = isinstance(error.__cause__, ImportError)
        return BackendState(name, False, error.message, INSTALL["gpu"] if missing else error.hint)
    detail = f"version {versions['tensorrt']} on {versions['gpu']}, {versions['driver']}"
    if versions.get("cublas") != "none":
        return BackendState(name, True, detail, None)
    return BackendState(name, True, f"{detail}; no cuBLASLt: prompts are slower", NO_CUBLAS)


def try_onnxruntime_cuda() -> BackendState:
    """Runs a tiny model on ONNX Runtime's CUDA provider."""
    name = "onnxruntime-cuda"
    try:
        from ojfa_export import backends

        versions = backends.load(name).versions()
        result = _double_on_cuda(21)
    except OjfaError as error:
        missing = isinstance(error.__cause__, ImportError)
        hint = INSTALL["gpu-onnxruntime"] if missing else error.hint
        return BackendState(name, False, error.message, hint)
    if result != 42:
        return BackendState(name, False, f"a tiny model gave {result} for 42", None)
    detail = f"version {versions['onnxruntime']} on {versions['gpu']}, {versions['driver']}"
    return BackendState(name, True, f"{detail}: ran a tiny model", None)


def _double_on_cuda(value: float) -> float:
    import numpy as np

    from ojfa_export.backends.cuda.device import the_device
    from ojfa_export.backends.onnxruntime_cuda.provider import open_session

    session = open_session(_DOUBLING_MODEL, "doctor", int(the_device().stream))
    return float(session.run(None, {"x": np.array([value], np.float32)})[0][0])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "2.13.0+cpu" gives (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match.group().split("."))) if match else ()


def _read_cpuinfo() -> tuple[str, set[str]]:
    """Name and features of the first core."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""
    return fields.get("model name", ""), set(flags.split())


def _list_gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,memory.total,driver_version"
    try:
        found = subprocess.run(
            [program, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]
