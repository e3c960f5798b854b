"""Copies of a bundle that may be damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ojfa_export.bundle.manifest import manifest_digest
from ojfa_export.bundle.names import MANIFEST
from ojfa_export.system.digest import sha256_file


class BundleCopy:
    """A copy of a bundle by hard links; a file is copied when it is to be changed."""

    def __init__(self, original: Path, directory: Path) -> None:
        shutil.copytree(original, directory, copy_function=os.link)
        self.directory = directory

    def own(self, name: str) -> Path:
        """The file, no longer shared with the original."""
        path = self.directory / name
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        return path

    def edit_manifest(self, change: Callable[[dict[str, Any]], None], *, resign: bool) -> None:
        """Edits manifest.json's object, and corrects its own digest if `resign`."""
        path = self.own(MANIFEST)
        fields = json.loads(path.read_text())
        change(fields)
        if resign:
            fields["digest"] = manifest_digest(fields)
        path.write_text(json.dumps(fields))

    def sign(self, *names: str) -> None:
        """Makes the digests of changed files anew, and the manifest's."""

        def change(fields: dict[str, Any]) -> None:
            for name in names:
                path = self.directory / name
                fields["files"][name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}

        self.edit_manifest(change, resign=True)
