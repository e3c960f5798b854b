"""A checkpoint's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ojfa_export.errors import CheckpointError
from ojfa_export.system.files import read_regular

# Bytes; the longest that are published, indexes of shards, have a few million.
LIMIT = 64 << 20


def read_fields(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: It is missing, damaged, or no plain file.
    """
    try:
        value = json.loads(read_regular(path, LIMIT).decode())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {path.name}",
            hint="name a Hugging Face model directory or a hub id",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} can't be read: {error}", hint="download the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object", hint="download the checkpoint again"
        )
    return value
