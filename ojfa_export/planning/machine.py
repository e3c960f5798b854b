"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ojfa_export._version import __version__
from ojfa_export.backends.backend import Accelerated, Backend

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers")


def describe_machine(
    packages: tuple[str, ...] = PACKAGES, backend: Backend | None = None
) -> dict[str, Any]:
    """Describes the machine and the versions that matter for speed; nothing that names the host.

    Args:
        packages: Packages whose versions are wanted; those not installed are left out.
        backend: What runs; its device is described too, where it has one.
    """
    device = backend.device() if isinstance(backend, Accelerated) else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        **({"threads": _threads()} if device is None else {"device": device}),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "versions": {
            "ojfa-export": __version__,
            "python": platform.python_version(),
            **_versions(packages),
        },
    }


def _threads() -> int:
    from ojfa_export.backends.onnxruntime.session import share_thread_pool

    return share_thread_pool()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
