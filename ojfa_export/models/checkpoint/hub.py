"""Finding a checkpoint: a directory, or a hub id where there is a network."""

from __future__ import annotations

from pathlib import Path

from ojfa_export.errors import CheckpointError, UsageError

PATTERNS = ["*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer.model", "merges.txt"]


def resolve(checkpoint: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint.

    Args:
        checkpoint: A directory or a hub id such as "openai-community/gpt2".
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: Neither a directory nor a model that can be downloaded, or a directory
            with something in it that is neither, such as a pipe.
        UsageError: A revision of a directory.
    """
    path = Path(checkpoint)
    if path.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision '{revision}' is of a hub id, and {checkpoint} is a directory",
                hint="leave --revision out, or name a hub id",
            )
        _refuse_special_files(path)
        return path
    if path.exists() or checkpoint.count("/") > 1 or checkpoint.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{checkpoint} is not a directory",
            hint="name a Hugging Face model directory or a hub id",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(
            f"{checkpoint} is not a directory, and huggingface-hub is not installed",
            hint="pip install 'ojfa-export[build]'",
        ) from error
    try:
        has_safetensors = ["*.bin"]  # a snapshot with both would be downloaded twice
        directory = Path(
            snapshot_download(
                checkpoint,
                revision=revision,
                allow_patterns=PATTERNS,
                ignore_patterns=has_safetensors,
            )
        )
        if not list(directory.glob("*.safetensors")):
            directory = Path(
                snapshot_download(checkpoint, revision=revision, allow_patterns=PATTERNS)
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{checkpoint} is neither a directory nor a model that can be downloaded: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            hint="check the spelling and the network, or name a local directory",
        ) from error
    return directory


def _refuse_special_files(directory: Path) -> None:
    """Transformers and tokenizers open files there by themselves, and would wait on a pipe."""
    for path in sorted(directory.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(
                f"{path} is no plain file: a pipe, a device or a socket",
                hint="a checkpoint holds plain files and folders; remove it, or download it again",
            )
