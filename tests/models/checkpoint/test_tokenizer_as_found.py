"""Tokenizer files as they are found: the ids of `AutoTokenizer`, in the build and in the bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_checkpoint
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import ojfa_export
from ojfa_export.bundle.names import TOKENIZER
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.stages import write_tokenizer
from ojfa_export.errors import CheckpointError, UsageError
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


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **plain, "special": True, **flags}


# Files beside tokenizer.json. Its own tokens are 0..309; 310 and more are new.
BESIDE: dict[str, dict[str, dict[str, Any]]] = {
    "a special token": {
        "tokenizer_config.json": {"added_tokens_decoder": {"310": added("<|im_end|>")}}
    },
    "several, in no order": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "312": added("__", special=False, normalized=True),
                "310": added("<|im_end|>", lstrip=True),
                "311": added("def", special=False, single_word=True, rstrip=True),
            }
        }
    },
    "added_tokens.json": {"added_tokens.json": {"<|im_end|>": 310, "漢字": 311}},
    "added_tokens.json and a map": {
        "added_tokens.json": {"<|im_end|>": 310},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}},
    },
    "named tokens": {
        "tokenizer_config.json": {
            "pad_token": "<|im_end|>", "extra_special_tokens": ["<one>", "é"],
            "bos_token": "<|endoftext|>", "add_bos_token": True,
        }
    },
    "end of text": {
        "tokenizer_config.json": {"add_eos_token": True, "eos_token": "<|endoftext|>"}
    },
    "a space before": {"tokenizer_config.json": {"add_prefix_space": True}},
    "a class": {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    },
    "Llama's class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast"}},
    "a class in config.json": {"config.json": {"tokenizer_class": "GPT2TokenizerFast"}},
    "nothing new": {"tokenizer_config.json": {"model_max_length": 7, "truncation_side": "left"}},
}  # fmt: skip
TOKENS = ("<|im_end|>", " <|im_end|> ", "<pad>", "<one>", " def ", "a__b")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("case", BESIDE)
def test_files_beside_tokenizer_json(
    tmp_path: Path, rng: np.random.Generator, case: str, family: str
) -> None:
    directory = make_checkpoint(family, tmp_path / "checkpoint", seed=1)
    write_beside(directory, case)
    texts = ["a<|im_end|>b", " a", "a", *random_texts(rng)]
    texts += ["".join(rng.choice([*PIECES, *TOKENS], 30)) for _ in range(4)]
    assert_as_transformers(directory, texts, tmp_path / "bundle")


def write_beside(directory: Path, case: str) -> None:
    for name, fields in BESIDE[case].items():
        path = directory / name
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | fields))


@pytest.mark.parametrize(
    ("case", "unmet"),
    [
        ("a special token", "the token '<|im_end|>'"),
        ("several, in no order", "the token '__'"),
        ("added_tokens.json", "the token '<|im_end|>'"),
        ("named tokens", "the token '<|im_end|>'"),
        ("end of text", "add_eos_token"),
        ("a space before", "add_prefix_space"),
        ("nothing new", None),
    ],
)
def test_without_transformers(
    directory: Path, monkeypatch: pytest.MonkeyPatch, case: str, unmet: str | None
) -> None:
    """What tokenizer.json does by itself is read; what needs transformers is refused by name."""
    alone = read_tokenizer(directory).to_str()
    write_beside(directory, case)
    monkeypatch.setitem(sys.modules, "transformers", None)
    if unmet is None:
        assert read_tokenizer(directory).to_str() == alone
        return
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer(directory)
    assert f"{directory} has {unmet} that tokenizer.json lacks" in caught.value.message
    assert caught.value.hint == "pip install 'ojfa-export[verify]'"


def test_token_that_the_model_lacks(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ojfa_export.load(tiny_bundle)
    model.tokenizer.add_special_tokens([f"<{number}>" for number in range(20)])
    assert model.encode("<0>") == [310]
    with pytest.raises(UsageError, match=r"the prompt has token ids outside 0\.\.319"):
        model.encode("a<19>")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"added_tokens_decoder": {"x": 1}}'])
def test_damaged_files_beside(directory: Path, text: str) -> None:
    (directory / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* can't be converted") as caught:
        read_tokenizer(directory)
    assert "\n" not in caught.value.message
