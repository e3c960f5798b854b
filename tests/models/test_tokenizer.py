"""Tokenizers that panic, pad or give nonsense: one error in words, and no word beside it."""

from __future__ import annotations

import base64
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ojfa_export.errors import OjfaError
from ojfa_export.models import tokenizer

Fields = dict[str, Any]

SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
PADDING = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}
STRIP = {"type": "Strip", "content": "a", "start": 9, "stop": 9}


@pytest.fixture
def fields(tiny_checkpoint: Path) -> Fields:
    return dict(json.loads((tiny_checkpoint / "tokenizer.json").read_text()))


def _parse(fields: Fields) -> Tokenizer:
    return tokenizer.parse(json.dumps(fields).encode())


PANICS: dict[str, Fields] = {
    "merges": {"model": {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "decoder": {"decoder": STRIP},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("case", PANICS)
def test_panic_is_an_error(fields: Fields, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes = copy.deepcopy(PANICS[case])
    fields["model"] |= changes.pop("model", {})
    with pytest.raises(ValueError, match=r".") as caught:
        _parse({**fields, **changes})
    assert type(caught.value.__cause__).__name__ == "PanicException"
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("characters", [b"", b"\0\0\0", b"\xfc\xff\xff\x7f" + bytes(8), None])
def test_character_maps_that_claim_more_than_they_hold(fields: Fields, characters: bytes) -> None:
    """`tokenizers` takes memory for what is claimed, and aborts the process without it."""
    encoded = "?" if characters is None else base64.b64encode(characters).decode()
    nested = {"type": "Precompiled", "precompiled_charsmap": encoded}
    with pytest.raises(ValueError, match="precompiled_charsmap is"):
        _parse({**fields, "normalizer": {"type": "Sequence", "normalizers": [nested]}})


def test_what_others_write_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with tokenizer.native_messages_dropped():
        subprocess.run(["sh", "-c", "echo native >&2"], check=True)
    assert capfd.readouterr().err == "native\n"


def test_padding_beyond_memory_is_not_tried(fields: Fields) -> None:
    made = _parse({**fields, "padding": PADDING, "truncation": TRUNCATION})
    assert tokenizer.encode(made, "def main") == tokenizer.encode(_parse(fields), "def main")


def test_token_that_fits_no_int32(fields: Fields) -> None:
    fields["model"]["vocab"]["x"] = 2**32 - 1
    with pytest.raises(OjfaError, match="gives token 4294967295, which no model has"):
        tokenizer.encode(_parse(fields), "x")


def test_text_and_tokens_that_it_fails_on() -> None:
    """Panics that no trial finds come later, and are errors as well."""

    class PanicException(BaseException):
        pass

    class Broken:
        def encode_batch(self, _: object, *, add_special_tokens: bool) -> None:
            raise PanicException("no entry\nfound for key")

        def decode(self, *_: object, **__: object) -> None:
            raise PanicException("slice index")

    with pytest.raises(OjfaError, match=r"the tokenizer fails on a text: no entry$") as caught:
        tokenizer.encode(Broken(), "a")
    assert caught.value.hint
    with pytest.raises(OjfaError, match=r"the tokenizer fails on tokens: slice index$"):
        tokenizer.decode(Broken(), [1])


def test_interrupt_is_no_word_of_a_tokenizer() -> None:
    class Interrupted:
        def encode_batch(self, _: object, *, add_special_tokens: bool) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode(Interrupted(), "a")


def test_build_says_it_in_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    path = hostile / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": STRIP}))
    output = str(tmp_path / "out.ojfa")
    command = [sys.executable, "-m", "ojfa_export", "build", str(hostile), "-o", output]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: {path} can't be read: ")
    assert second.startswith("hint: ")
