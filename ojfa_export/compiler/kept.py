"""What is finished in the directory of a build, and which of it another build can go on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ojfa_export.system.atomic import write_atomically


@dataclass(frozen=True)
class KeptStage:
    """A stage that was finished, or begun and left with files of use.

    Attributes:
        key: Digest of everything that decides what it makes.
        files: What it made, below the directory.
        record: What it cost; None where it was not finished.
    """

    key: str
    files: tuple[str, ...]
    record: dict[str, Any] | None = None


@dataclass
class State:
    """The file of a directory's state.

    Attributes:
        fingerprint: Of everything that decides the result.
        inode: Of the bundle's directory, which tells it from any other whatever their names: after
            a kill while publishing, what was replaced lies where the work was.
        stages: By name.
        current: The stage that was begun last: what no stage has made is its work.
        current_key: The key that it was begun with.
    """

    fingerprint: str
    inode: int | None
    stages: dict[str, KeptStage] = field(default_factory=dict)
    current: str | None = None
    current_key: str | None = None

    def save(self, path: Path) -> None:
        """Writes the file."""
        write_atomically(path, json.dumps(asdict(self), indent=2).encode())

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Records of finished stages by name."""
        return {name: each.record for name, each in self.stages.items() if each.record}

    def begin(self, name: str, key: str) -> None:
        """Notes that a stage begins."""
        self.current, self.current_key = name, key

    def end(self, name: str, key: str, record: dict[str, Any], directory: Path) -> None:
        """Notes that a stage is finished; all that no other stage has made is its work."""
        self.stages.pop(name, None)
        self.stages[name] = KeptStage(key, tuple(self._of_nobody(directory)), record)
        self.current = self.current_key = None

    def fitting(self, directory: Path, keys: Mapping[str, str]) -> dict[str, KeptStage]:
        """The stages that a build of these keys can go on with.

        Finished ones of which a file is missing are none: what was only needed for a later stage
        is removed after it. Of the one that was interrupted, what is there counts.
        """
        found = dict(self.stages)
        if self.current is not None and self.current_key is not None:
            begun = found.get(self.current)
            files = [*(begun.files if begun else ()), *self._of_nobody(directory)]
            found[self.current] = KeptStage(self.current_key, tuple(files))
        return {
            name: each
            for name, each in found.items()
            if each.key == keys.get(name)
            and (each.record is None or all((directory / file).exists() for file in each.files))
        }

    def _of_nobody(self, directory: Path) -> Iterator[str]:
        owned = {file for each in self.stages.values() for file in each.files}
        return (name for name in names_below(directory) if name not in owned)


def read_state(path: Path) -> State | None:
    """Reads the file; None where there is none, or one of another form."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        stages = {
            name: KeptStage(each["key"], tuple(each["files"]), each["record"])
            for name, each in document.pop("stages").items()
        }
        return State(**document, stages=stages)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def names_below(directory: Path) -> list[str]:
    """Files of the bundle and of the scratch folder, relative to the directory of the work."""
    return sorted(
        path.relative_to(directory).as_posix()
        for folder in ("bundle", "scratch")
        for path in (directory / folder).rglob("*")
        if path.is_file()
    )
