"""A bundle to damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_copy import BundleCopy


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> BundleCopy:
    return BundleCopy(tiny_bundle, tmp_path / "copy.ojfa")
