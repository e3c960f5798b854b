"""Opening a bundle's block jump, for the backends that run such jumps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ojfa_export.backends.backend import Backend, Engines
from ojfa_export.backends.exit_blocks import ExitBlocks
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.decoding.arrays import Float32
from ojfa_export.errors import BackendError
from ojfa_export.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class BlockJump:
    """A bundle's block jump, to be opened.

    Attributes:
        exits: That it serves.
        blocks: Behind them: one for all, or one for each.
        spec: Of the model.
        weights: Directory of the weight files.
        engines: Engine files by graph name, those of `names.exit_names` among them.
        rotary: The model's cosines and sines [rows, rotary_dim/2], or None.
        files: Opens every one of these files, now and later.
    """

    exits: tuple[int, ...]
    blocks: int
    spec: ModelSpec
    weights: Path
    engines: Mapping[str, Path]
    rotary: tuple[Float32, Float32] | None
    files: Files = UNCHECKED


@runtime_checkable
class RunsBlockJumps(Protocol):
    """A backend that runs block jumps: `Backend.build_engine` takes their graphs as well."""

    def open_exit_blocks(self, engines: Engines, jump: BlockJump) -> ExitBlocks:
        """Opens a bundle's block jump.

        Args:
            engines: Of the model, as `Backend.open_engines` gave them.
            jump: The jump.
        """
        ...


def check_runs_jump(backend: Backend, exits: Sequence[int] | None) -> None:
    """Refuses a block jump for a backend that doesn't run any.

    Args:
        backend: The backend.
        exits: Of the block jump; None where the shortcut is another.

    Raises:
        BackendError: Naming it.
    """
    if exits is not None and not isinstance(backend, RunsBlockJumps):
        raise BackendError(
            f"the shortcut is a block jump, which the {backend.name} backend doesn't run",
            hint="build the bundle with another shortcut",
        )


def open_jump(backend: Backend, engines: Engines, jump: BlockJump) -> None:
    """Gives engines the blocks of their block jump.

    Args:
        backend: Whose engines; it runs block jumps, see `check_runs_jump`.
        engines: Of the model.
        jump: The block jump.
    """
    assert isinstance(backend, RunsBlockJumps)
    engines.exit_blocks = backend.open_exit_blocks(engines, jump)
