"""Early-exit deployment compiler for Hugging Face causal language models.

model = ojfa_export.load("demo.ojfa")
for token in model.stream("def parse(", exit=8):
    print(token.text, end="")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ojfa_export._version import __version__

if TYPE_CHECKING:
    from ojfa_export.decoding.options import GenerationOptions
    from ojfa_export.decoding.policy import ExitPolicy
    from ojfa_export.decoding.speculation import Speculation
    from ojfa_export.engine.engine import Engine
    from ojfa_export.engine.request import Request, RequestResult, RequestToken
    from ojfa_export.engine.stats import EngineStats
    from ojfa_export.errors import (
        BackendError,
        BundleError,
        OjfaError,
        OverloadedError,
        UsageError,
    )
    from ojfa_export.runtime.generation import Completion, Generation, Token
    from ojfa_export.runtime.model import Model, load
    from ojfa_export.runtime.monitor import Monitor
    from ojfa_export.runtime.session import Session

__all__ = [
    "BackendError",
    "BundleError",
    "Completion",
    "Engine",
    "EngineStats",
    "ExitPolicy",
    "Generation",
    "GenerationOptions",
    "Model",
    "Monitor",
    "OjfaError",
    "OverloadedError",
    "Request",
    "RequestResult",
    "RequestToken",
    "Session",
    "Speculation",
    "Token",
    "UsageError",
    "__version__",
    "load",
]

_HOMES = {
    "BackendError": "errors",
    "BundleError": "errors",
    "Completion": "runtime.generation",
    "Engine": "engine.engine",
    "EngineStats": "engine.stats",
    "ExitPolicy": "decoding.policy",
    "Generation": "runtime.generation",
    "GenerationOptions": "decoding.options",
    "Model": "runtime.model",
    "Monitor": "runtime.monitor",
    "OjfaError": "errors",
    "OverloadedError": "errors",
    "Request": "engine.request",
    "RequestResult": "engine.request",
    "RequestToken": "engine.request",
    "Session": "runtime.session",
    "Speculation": "decoding.speculation",
    "Token": "runtime.generation",
    "UsageError": "errors",
    "load": "runtime.model",
}


def __getattr__(name: str) -> Any:
    """Imports the interface when it is first used: `ojfa-export --help` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ojfa_export' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ojfa_export.{_HOMES[name]}"), name)
