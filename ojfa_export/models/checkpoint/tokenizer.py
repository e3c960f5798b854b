"""The checkpoint's tokenizer as one tokenizer.json, which needs no transformers to be read."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.fields import read_fields
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.family import eos_token_ids as family_eos_token_ids
from ojfa_export.models.tokenizer import LIMIT, parse
from ojfa_export.system.files import read_regular


def read_tokenizer(directory: Path) -> Tokenizer:
    """Reads tokenizer.json, or converts the older files where transformers is installed.

    Raises:
        CheckpointError: No tokenizer, or one that can't be converted.
    """
    path = directory / "tokenizer.json"
    if path.exists():
        try:
            return parse(read_regular(path, LIMIT))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} can't be read: {error}", hint="download the checkpoint again"
            ) from error
    if not any((directory / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"{directory} holds no tokenizer.json",
            hint="copy the model's tokenizer files into the directory",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{directory} holds no tokenizer.json, and converting needs transformers",
            hint="pip install 'ojfa-export[verify]'",
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, local_files_only=True)
        return parse(tokenizer.backend_tokenizer.to_str().encode())
    except BaseException as error:  # whatever the files lead transformers, and Rust below it, to
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CheckpointError(
            f"the tokenizer of {directory} can't be converted to tokenizer.json: {error}",
            hint="save it once with transformers' fast tokenizer",
        ) from error


def eos_token_ids(directory: Path, config_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids: generation_config.json's where it names any, else the config's.

    Raises:
        CheckpointError: generation_config.json is damaged, or names no tokens of the model.
    """
    path = directory / "generation_config.json"
    if not path.exists():
        return config_ids
    return family_eos_token_ids(Config(read_fields(path), str(path)), vocab_size) or config_ids
