"""What writing needs beside a build."""

from __future__ import annotations

import importlib

from ojfa_export.errors import OjfaError


def require_packages(what: str) -> None:
    """Refuses to begin without torch and transformers.

    Args:
        what: Needs them.

    Raises:
        OjfaError: One is not installed.
    """
    for package in ("torch", "transformers"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise OjfaError(
                f"{what} needs the package {package}, which is not installed",
                hint="pip install 'ojfa-export[build,verify]'",
            ) from error
