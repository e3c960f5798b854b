"""A checkpoint made hostile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Hostile:
    """A checkpoint made hostile.

    Attributes:
        directory: The checkpoint.
        refuse: Whether it must not be built.
        late: Whether only reading the weights shows what is wrong.
        output: Where to build; a path that can't be encoded is one of the attacks.
    """

    directory: Path
    output: str
    refuse: bool = True
    late: bool = False
