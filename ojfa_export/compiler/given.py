"""Shortcuts that a build is given: a kind or a file for exits, and a draft layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ojfa_export.bundle.draft_shortcut import DraftShortcut
from ojfa_export.bundle.shortcut_file import AnyShortcut, ExitShortcut, load, save
from ojfa_export.compiler.eagle3 import read_eagle3
from ojfa_export.errors import CheckpointError, OjfaError, UsageError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.shortcuts.kinds import Shipped
from ojfa_export.system.digest import sha256_file


@dataclass(frozen=True, eq=False)
class Given:
    """What is given, read and checked.

    Attributes:
        kind: To fit, where a kind is named.
        exits: Of exits, where there is one.
        exits_path: Its file.
        draft: A draft layer, where there is one.
        draft_path: Its file, or the directory of an EAGLE-3 drafter.
        digests: Of the files of each.
    """

    kind: Shipped | None = None
    exits: ExitShortcut | None = None
    exits_path: Path | None = None
    draft: DraftShortcut | None = None
    draft_path: Path | None = None
    digests: Mapping[Path | None, tuple[str, ...]] = field(default_factory=dict)

    def copy(self, path: Path, target: Path, model_sha256: str) -> None:
        """Copies a file that was given, with what it says of its training.

        Args:
            path: The file; a draft layer of a directory is written instead.
            target: Where to.
            model_sha256: Digest of the model.

        Raises:
            OjfaError: It was changed since it was read.
        """
        if path.is_dir():
            assert self.draft is not None
            save(self.draft, target, model_sha256)
            return
        shutil.copyfile(path, target)
        if (sha256_file(target),) != self.digests[path]:
            raise OjfaError(
                f"{path} was changed while the build read it",
                hint="build again, once nothing writes it",
            )


def read_given(
    shortcuts: Sequence[Shipped | Path], checkpoint: Checkpoint, model_sha256: str
) -> Given:
    """Reads the shortcuts of a checkpoint.

    Raises:
        UsageError: Two of one sort.
        OjfaError: One can't be read, or is another model's.
    """
    kinds = [each for each in shortcuts if isinstance(each, str)]
    paths = [each for each in shortcuts if isinstance(each, Path)]
    drafts: list[tuple[Path, DraftShortcut]] = []
    exits: list[tuple[Path, ExitShortcut]] = []
    for path in paths:
        shortcut = _read(path, checkpoint, model_sha256)
        if isinstance(shortcut, DraftShortcut):
            drafts.append((path, shortcut))
        else:
            exits.append((path, shortcut))
    of_exits, of_drafts = ([path for path, _ in each] for each in (exits, drafts))
    for what, found in (("of exits", [*kinds, *of_exits]), ("that draft", of_drafts)):
        if len(found) > 1:
            raise UsageError(
                f"two shortcuts {what} are given: {found[0]} and {found[1]}",
                hint="a bundle has one of exits and one that drafts, at most",
            )
    nothing = (None, None)
    exits_path, exit_shortcut = exits[0] if exits else nothing
    draft_path, draft = drafts[0] if drafts else nothing
    return Given(
        kind=kinds[0] if kinds else None,
        exits=exit_shortcut,
        exits_path=exits_path,
        draft=draft,
        draft_path=draft_path,
        digests={path: tuple(map(sha256_file, _files(path))) for path in paths},
    )


def read_exit_shortcut(path: Path, checkpoint: Checkpoint, model_sha256: str) -> ExitShortcut:
    """Reads a checkpoint's shortcut of exits.

    Raises:
        OjfaError: No shortcut, a draft layer, or another model's.
    """
    shortcut = _read(path, checkpoint, model_sha256)
    if isinstance(shortcut, DraftShortcut):
        raise UsageError(
            f"{path} is a draft layer, where a shortcut of exits is needed", hint="build with it"
        )
    return shortcut


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())


def _read(path: Path, checkpoint: Checkpoint, model_sha256: str) -> AnyShortcut:
    hint = "make one with 'ojfa-export train' or 'ojfa-export calibrate'"
    shortcut: AnyShortcut
    if path.is_dir():
        shortcut = read_eagle3(path, checkpoint.spec)
    else:
        shortcut, of_model = load(path)
        if of_model != model_sha256:
            raise CheckpointError(
                f"{path} is a shortcut of another model than {checkpoint.directory}", hint=hint
            )
    try:
        shortcut.check_fits(checkpoint.spec)
    except ValueError as error:
        raise CheckpointError(
            f"{path} doesn't fit {checkpoint.directory}: {error}", hint=hint
        ) from error
    return shortcut
