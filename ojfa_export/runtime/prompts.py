"""Prompts to token ids that the model can take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer

from ojfa_export.decoding.prompts import check_known, check_token_ids
from ojfa_export.errors import UsageError
from ojfa_export.models.tokenizer import encode, plain_tokenizer
from ojfa_export.system.arguments import shown


class PromptEncoder:
    """Encodes prompts.

    Args:
        tokenizer: The bundle's.
        vocab_size: Tokens of the model.
        max_length: Tokens that a sequence may hold.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_length: int) -> None:
        self._tokenizer, self._vocab_size, self._max_length = tokenizer, vocab_size, max_length

    def encode(self, prompt: str | Sequence[int], *, special: bool) -> list[int]:
        """See `Model.encode`."""
        if isinstance(prompt, str):
            ids = check_known(self._encode(prompt, special=special), self._vocab_size)
        else:
            ids = check_token_ids(prompt, self._vocab_size)
        if not ids:
            raise UsageError(
                "the prompt is empty", hint="give at least one character: -p 'def main('"
            )
        if len(ids) > self._max_length:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the cache holds {self._max_length}",
                hint="shorten it, or build the bundle with a larger --max-cache-length",
            )
        return ids

    def _encode(self, prompt: str, *, special: bool) -> list[int]:
        try:
            return encode(self._tokenizer if special else self._plain, prompt)
        except TypeError as error:  # what tokenizers says of anything that is not UTF-8
            raise UsageError(
                f"a prompt is not text in UTF-8: {shown(prompt)}",
                hint="give a str of whole characters",
            ) from error

    @cached_property
    def _plain(self) -> Tokenizer:
        return plain_tokenizer(self._tokenizer)
