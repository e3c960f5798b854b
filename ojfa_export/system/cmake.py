"""Where the C++ runtime's CMake package is: `python -m ojfa_export --cmake-dir`."""

from __future__ import annotations

from pathlib import Path

from ojfa_export.errors import BackendError

# In a checkout the sources lie beside the package; a wheel carries them inside.
PLACES = (
    Path(__file__).parents[2] / "engines" / "cmake" / "package",
    Path(__file__).parents[1] / "_engines" / "cmake" / "package",
)


def cmake_directory() -> Path:
    """The directory of ojfaConfig.cmake, by which a project builds the runtime from its sources.

    Raises:
        BackendError: It is missing.
    """
    for place in PLACES:
        if (place / "ojfaConfig.cmake").is_file():
            return place
    raise BackendError("the C++ runtime's sources are missing", hint="install ojfa-export again")
