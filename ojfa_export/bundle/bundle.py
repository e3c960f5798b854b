"""Opening a bundle: nothing is used that the manifest does not name with that digest."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.checked import WHOLE, CheckedFiles
from ojfa_export.bundle.entries import EngineSet, GraphEntry, TensorSlice
from ojfa_export.bundle.graphs import check_graphs
from ojfa_export.bundle.manifest import Manifest, read_manifest
from ojfa_export.bundle.names import (
    CHECK_HEAD,
    DRAFT,
    DRAFT_GRAPHS,
    GRAPHS,
    MANIFEST,
    SHORTCUT,
    TOKENIZER,
)
from ojfa_export.errors import BundleError
from ojfa_export.system.paths import check_utf8
from ojfa_export.system.publish import recover


class Bundle:
    """A bundle directory whose every file has been checked.

    Args:
        directory: The bundle.

    Attributes:
        directory: The same.
        files: Its files: everything that opens one asks here, whenever it does.

    Raises:
        BundleError: A file is missing, extra, altered, a symbolic link, or outside the bundle; the
            manifest and the graphs contradict each other.
        UsageError: The path is not UTF-8.
    """

    def __init__(self, directory: Path) -> None:
        check_utf8(directory)
        recover(directory)
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self._check_names()
        self._check_references()
        self.files = CheckedFiles(directory, self.manifest.files)
        check_graphs(self.manifest, self.files)

    @property
    def graphs(self) -> Path:
        """Directory of the portable graphs and the weights."""
        return self.files.directory / GRAPHS

    def engines(self, backend: str) -> EngineSet:
        """The engines of a backend.

        Raises:
            BundleError: The bundle has none.
        """
        for engines in self.manifest.engines:
            if engines.backend == backend:
                return engines
        built = ", ".join(engines.backend for engines in self.manifest.engines) or "none"
        raise BundleError(
            f"{self.directory} has no engines for backend '{backend}' (it has: {built})",
            hint=f"build them with 'ojfa-export build {self.directory} --backend {backend}'",
        )

    def engine_files(self, backend: str) -> dict[str, Path]:
        """Engine files of a backend by graph name, the check head's among them, where there is one.

        Raises:
            BundleError: The bundle has none, or not all.
        """
        files, check = dict(self.engines(backend).files), self.manifest.check
        if check is not None:
            found = [each.files for each in check.engines if each.backend == backend]
            if not found:
                raise BundleError(
                    f"{self.directory} has no check head for backend '{backend}'", hint=WHOLE
                )
            files |= found[0]
        return {name: self.files.directory / file for name, file in files.items()}

    def path(self, name: str) -> Path:
        """Where a file is, for what opens it right now.

        Raises:
            BundleError: It was changed since the bundle was opened.
        """
        path = self.files.directory / name
        with self.files.held(path):
            return path

    def read(self, name: str) -> bytes:
        """A file whole.

        Raises:
            BundleError: It was changed since the bundle was opened.
        """
        return self.files.read(self.files.directory / name)

    def tensor(self, location: TensorSlice) -> NDArray[np.float32]:
        """A float32 tensor, read into memory.

        Raises:
            BundleError: It reaches beyond its file, which may have been changed since.
        """
        path = self.files.directory / location.file
        with self.files.mapped(path, "<f4", location.offset, location.shape) as array:
            return np.array(array, np.float32)

    def integers(self, location: TensorSlice) -> NDArray[np.int32]:
        """An int32 tensor, read into memory.

        Raises:
            BundleError: It reaches beyond its file, which may have been changed since.
        """
        path = self.files.directory / location.file
        with self.files.mapped(path, "<i4", location.offset, location.shape) as array:
            return np.array(array, np.int32)

    def check_tokens(self) -> NDArray[np.int32] | None:
        """Ids [n], rising, that the check head's logits are of; None where there is none.

        Raises:
            BundleError: They are none of the model's.
        """
        check = self.manifest.check
        if check is None:
            return None
        tokens = self.integers(check.tokens)
        inside = 0 <= int(tokens[0]) <= int(tokens[-1]) < self.manifest.model.spec.vocab_size
        if not inside or not (np.diff(tokens) > 0).all():
            raise BundleError(
                f"{self.directory / MANIFEST}: the check head's tokens are none of the model's",
                hint="don't use this bundle: build it again",
            )
        return tokens

    def _check_names(self) -> None:
        named = set(self.manifest.files)
        for name in named:
            path = PurePosixPath(name)
            outside = path.is_absolute() or ".." in path.parts or not path.parts
            if outside or str(path) != name or "\\" in name:
                raise BundleError(
                    f"{self.directory / MANIFEST} names a path that leaves the bundle: {name!r}",
                    hint="don't use this bundle: it was altered",
                )
        found = set(_walk(self.directory)) - {MANIFEST}
        for name in sorted(named - found):
            raise BundleError(f"{self.directory} lacks file {name!r}", hint=WHOLE)
        for name in sorted(found - named):
            raise BundleError(
                f"{self.directory} holds {name!r}, which its manifest does not name",
                hint="remove it, or use a fresh copy of the bundle",
            )

    def _check_references(self) -> None:
        manifest, draft, check = self.manifest, self.manifest.draft, self.manifest.check
        graphs, engines = manifest.all_graphs, manifest.all_engines
        wanted = {graph.file for graph in graphs}
        wanted |= {name for graph in graphs for name in graph.weights}
        wanted |= {file for each in engines for file in each.files.values()}
        wanted |= {TOKENIZER, SHORTCUT}
        if manifest.rotary is not None:
            wanted |= {manifest.rotary.cos.file, manifest.rotary.sin.file}
        if draft is not None:
            wanted |= {DRAFT, draft.rotary.cos.file, draft.rotary.sin.file}
            wanted |= {draft.tokens.file} if draft.tokens else set()
        if check is not None:
            wanted.add(check.tokens.file)
        for name in sorted(wanted - set(manifest.files)):
            raise BundleError(
                f"{self.directory / MANIFEST} refers to {name!r} without its digest", hint=WHOLE
            )
        self._check_parts(manifest.graphs, manifest.engines, manifest.graph_names)
        if draft is not None:
            self._check_parts(draft.graphs, draft.engines, list(DRAFT_GRAPHS))
        if check is not None:
            self._check_parts(check.graphs, check.engines, [CHECK_HEAD])

    def _check_parts(
        self, graphs: tuple[GraphEntry, ...], engines: tuple[EngineSet, ...], names: list[str]
    ) -> None:
        """Makes sure that graphs and engines are all those that there must be."""
        for what, found in [
            ("graphs", [graph.name for graph in graphs]),
            *((f"{each.backend} engines", list(each.files)) for each in engines),
        ]:
            if sorted(found) != sorted(names):
                blocks = self.manifest.model.spec.blocks
                raise BundleError(
                    f"{self.directory / MANIFEST} names {what} other than those of {blocks} blocks",
                    hint=WHOLE,
                )


def _walk(directory: Path) -> list[str]:
    """Every file below a directory, by its path inside; links are refused."""
    names = []
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            names.append(path.relative_to(directory).as_posix())
        elif not stat.S_ISDIR(mode):
            raise BundleError(
                f"{path} is a symbolic link or special file; a bundle holds plain files only",
                hint="use a fresh copy of the bundle",
            )
    return names
