"""Tokenizer files as they are found: the ids of `AutoTokenizer`, in the build and in the bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ojfa_export.bundle.names import TOKENIZER
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.stages import write_tokenizer
from ojfa_export.models import tokenizer
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer

PIECES = ("def main(", " ", "\n\n", "\t", "é", "漢字", "\U0001f600", "x1", "<|endoftext|>", "__")


def random_texts(rng: np.random.Generator) -> list[str]:
    """Short ones, an empty one, and one longer than any truncation."""
    lengths = (0, 1, 5, 40, 1500)
    return ["def main(", *("".join(rng.choice(PIECES, length)) for length in lengths)]


def assert_as_transformers(directory: Path, texts: list[str], bundle: Path) -> None:
    """The build's tokenizer, and the bundle's file as anybody may read it, give its ids."""
    reference = AutoTokenizer.from_pretrained(directory)
    ours = read_tokenizer(directory)
    bundle.mkdir()
    write_tokenizer(ours, bundle)
    copied = Tokenizer.from_file(str(bundle / TOKENIZER))
    for text in texts:
        expected = reference(text)["input_ids"]
        assert tokenizer.encode(ours, text) == expected, text
        assert copied.encode(text).ids == expected, text


@pytest.mark.parametrize("padding", [None, 24])
@pytest.mark.parametrize("truncation", [None, 16, 1100])
def test_saved_padding_and_truncation(
    directory: Path, rng: np.random.Generator, padding: int | None, truncation: int | None
) -> None:
    saved = Tokenizer.from_file(str(directory / TOKENIZER))
    if padding is not None:
        saved.enable_padding(length=padding)
    if truncation is not None:
        saved.enable_truncation(truncation)
    saved.save(str(directory / TOKENIZER))
    assert_as_transformers(directory, random_texts(rng), directory / "bundle")


def test_truncated_calibration_text(directory: Path, calibration_text: Path) -> None:
    """What a tokenizer would truncate is enough text all the same."""
    saved = Tokenizer.from_file(str(directory / TOKENIZER))
    saved.enable_truncation(16)
    saved.save(str(directory / TOKENIZER))
    options = BuildOptions(
        str(directory), directory / "out.ojfa", calibration_data=(calibration_text,),
        calibration_tokens=1024,
    )  # fmt: skip
    assert Inputs(options).windows.fit.size >= 768
