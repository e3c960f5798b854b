"""The one place that calls `tokenizers`, so that whatever it says of a hostile file is an error.

It is written in Rust and panics where a tokenizer.json is odd enough, which Python sees as a
BaseException that is no Exception, beside a message and a backtrace on standard error.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenizers import Tokenizer

from ojfa_export.errors import OjfaError

# Bytes of a tokenizer.json at most; the largest that are published have a seventh of it.
LIMIT = 256 << 20
# Enough to meet every part of a tokenizer: words, spaces, digits, a letter beyond ASCII.
_TRIAL = "def main(x):\n    return 'caf\u00e9' + str(12345)\n"
_HINT = "its tokenizer.json is damaged or unusual; save it anew with transformers' fast tokenizer"
_one_reader = threading.Lock()


def parse(document: bytes) -> Tokenizer:
    """Makes a tokenizer of a tokenizer.json, and tries it.

    Saved padding and truncation are switched off: transformers, too, pads and truncates only where
    a call asks for it.

    Raises:
        ValueError: It is no tokenizer, or a broken one.
    """
    _check_precompiled(document)
    with _one_reader, native_messages_dropped():
        try:
            tokenizer = Tokenizer.from_buffer(document)
            tokenizer.no_padding()
            tokenizer.no_truncation()
        except BaseException as error:
            raise ValueError(_reason(error)) from error
        try:
            tokenizer.decode(tokenizer.encode(_TRIAL).ids)
        except Exception:  # some have no token for some characters, and no unknown one
            pass
        except BaseException as error:
            raise ValueError(_reason(error)) from error
    return tokenizer


def _check_precompiled(document: bytes) -> None:
    """Refuses character maps that claim to be longer than they are.

    `tokenizers` takes memory for what such a map claims, and ends the process where it gets none.
    """
    try:
        found = [json.loads(document)]
    except (ValueError, RecursionError):
        return  # it says so itself
    while found:
        each = found.pop()
        if isinstance(each, list):
            found += each
        elif isinstance(each, dict):
            found += each.values()
            characters = each.get("precompiled_charsmap")
            if each.get("type") == "Precompiled" and isinstance(characters, str):
                _check_characters(characters)


def _check_characters(characters: str) -> None:
    try:
        content = base64.b64decode(characters)
    except ValueError as error:
        raise ValueError("precompiled_charsmap is not base64") from error
    if len(content) < 4 or int.from_bytes(content[:4], "little") > len(content) - 4:
        raise ValueError("precompiled_charsmap is shorter than it claims to be")


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that takes special tokens for text."""
    copy = parse(tokenizer.to_str().encode())
    copy.encode_special_tokens = True
    return copy


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """A text's token ids.

    Args:
        tokenizer: The model's.
        text: Text.
        add_special_tokens: Whether a beginning or an end of text is added, where there is one.

    Raises:
        OjfaError: The tokenizer fails on it.
        TypeError: It is not text in UTF-8.
    """
    return encode_all(tokenizer, [text], add_special_tokens=add_special_tokens)[0]


def encode_all(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Each text's token ids; as `encode`."""
    try:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        found = [list(each.ids) for each in encoded]
    except TypeError:
        raise
    except BaseException as error:
        raise OjfaError(f"the tokenizer fails on a text: {_reason(error)}", _HINT) from error
    highest = max((max(ids, default=0) for ids in found), default=0)
    if highest >= 2**31:
        raise OjfaError(f"the tokenizer gives token {highest}, which no model has", _HINT)
    return found


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones.

    Raises:
        OjfaError: The tokenizer fails on them.
    """
    try:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    except BaseException as error:
        raise OjfaError(f"the tokenizer fails on tokens: {_reason(error)}", _HINT) from error


def _reason(error: BaseException) -> str:
    """What a tokenizer says, in one line; raises again what it didn't say."""
    panicked = type(error).__name__ == "PanicException"
    if isinstance(error, MemoryError) or not (panicked or isinstance(error, Exception)):
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def native_messages_dropped() -> Iterator[None]:
    """Keeps what is written to standard error, and drops it where this fails: it is said in words.

    Only while a tokenizer is read: what other threads write meanwhile comes a moment later.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as kept, open(stderr, "wb", 0) as written:  # noqa: PTH123
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
        kept.seek(0)
        written.write(kept.read())
