"""Every module can be imported; those of a backend where its SDK is."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import ojfa_export

# Other packages that a module may lack here, by the folder that alone may import them.
SDKS = {
    "ojfa_export.backends.cuda.": {"cuda"},
    "ojfa_export.backends.onnxruntime_cuda.": {"cuda"},
    "ojfa_export.backends.tensorrt.": {"cuda", "tensorrt", "polygraphy"},
    "ojfa_export.serving.ray_app": {"ray"},
    "ojfa_export.serving.triton_model": {"triton_python_backend_utils"},
}
# Running the program is what importing it does.
NOT_IMPORTED = {"ojfa_export.__main__"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ojfa_export.__path__, "ojfa_export.")
    if module.name not in NOT_IMPORTED
)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    allowed = {sdk for folder, sdks in SDKS.items() if name.startswith(folder) for sdk in sdks}
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in allowed:
            raise
        pytest.skip(f"{error.name} is not installed")


def test_every_file_is_in_a_package():
    """A folder without __init__.py would be left out above, and by tools."""
    root = Path(ojfa_export.__path__[0])
    files = {path.relative_to(root.parent) for path in root.rglob("*.py")}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert names - {"ojfa_export"} == {*MODULES, *NOT_IMPORTED}
