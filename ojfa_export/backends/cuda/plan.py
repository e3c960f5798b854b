"""Plans: what a backend keeps for each graph, beside the files that the plan names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.errors import BundleError


class Part(BaseModel):
    """A plan, or a part of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


P = TypeVar("P", bound=Part)


def read(
    path: Path,
    kind: type[P],
    named: Callable[[P], Iterable[str]],
    backend: str,
    files: Files = UNCHECKED,
) -> P:
    """Reads a graph's plan.

    Args:
        path: Its file.
        kind: What it is.
        named: Names of the files that it names.
        backend: Which rebuilds it.
        files: Opens it.

    Raises:
        BundleError: It is damaged, or names files elsewhere.
    """
    try:
        plan = kind.model_validate_json(files.read(path))
    except (OSError, ValidationError, ValueError) as error:
        raise BundleError(
            f"{path} can't be read: {str(error).splitlines()[0]}",
            hint=f"rebuild the engines with 'ojfa-export build BUNDLE --backend {backend}'",
        ) from error
    for name in named(plan):
        if Path(name).name != name:
            raise BundleError(f"{path} names a file elsewhere: {name!r}", hint="don't use it")
    return plan
