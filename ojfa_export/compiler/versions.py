"""Versions of what decides a build's results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from ojfa_export._version import __version__

RECORDED_PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
    "torch",
    "transformers",
)


def tool_versions() -> dict[str, str]:
    """Versions of this tool and of the libraries that decide its results."""
    versions = {"ojfa-export": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
