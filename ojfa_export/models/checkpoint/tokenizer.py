"""The checkpoint's tokenizer as one tokenizer.json, which needs no transformers to be read."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.beside import find_unmet, has_more
from ojfa_export.models.checkpoint.quiet import quiet_transformers
from ojfa_export.models.tokenizer import LIMIT, native_messages_dropped, parse
from ojfa_export.system.files import read_regular


def read_tokenizer(directory: Path) -> Tokenizer:
    """Reads the tokenizer that transformers makes of a checkpoint's files.

    tokenizer.json alone is enough where nothing lies beside it that could change it. Elsewhere
    transformers makes it; where that isn't installed, what tokenizer.json lacks is refused.

    Raises:
        CheckpointError: No tokenizer, a damaged one, or one that needs transformers.
    """
    path, tokenizer = directory / "tokenizer.json", None
    if path.exists():
        try:
            tokenizer = parse(read_regular(path, LIMIT))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} can't be read: {error}", hint="download the checkpoint again"
            ) from error
        if not has_more(directory):
            return tokenizer
    elif not any((directory / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"{directory} holds no tokenizer.json",
            hint="copy the model's tokenizer files into the directory",
        )
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        unmet = "a tokenizer" if tokenizer is None else find_unmet(directory, tokenizer)
        if tokenizer is not None and unmet is None:
            return tokenizer
        raise CheckpointError(
            f"{directory} has {unmet} that tokenizer.json lacks, and transformers, which would "
            "add it, is not installed",
            hint="pip install 'ojfa-export[verify]'",
        ) from error
    return _convert(directory)


def _convert(directory: Path) -> Tokenizer:
    """The tokenizer as transformers has it."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers(), native_messages_dropped():
            found = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            document = found.backend_tokenizer.to_str()
        return parse(document.encode())
    except BaseException as error:  # whatever the files lead transformers, and Rust below it, to
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the tokenizer of {directory} can't be converted to tokenizer.json: {first}",
            hint="save it once with transformers' fast tokenizer",
        ) from error
