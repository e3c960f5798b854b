"""Models of three families, as bundles."""

from __future__ import annotations

import pytest
from vectors.cases import open_bundle

from ojfa_export.runtime.model import Model


@pytest.fixture(scope="session", params=["llama", "gpt2", "phi3"])
def model(request) -> Model:
    """Phi-3 with LongRoPE, whose rotation switches within the cache."""
    return open_bundle(request.param)


@pytest.fixture(scope="session")
def llama() -> Model:
    return open_bundle("llama")
