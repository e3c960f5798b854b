"""The directory that holds a trained model, as Hugging Face's libraries read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel

from calibration.training.models import MAX_POSITIONS
from calibration.training.tokens import END_OF_TEXT, END_OF_TEXT_ID


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document as indented JSON with a final newline."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_checkpoint(
    output: Path, model: PreTrainedModel, tokenizer: Tokenizer, training: dict[str, Any]
) -> None:
    """Writes the Hugging Face directory in fp16, whole or not at all."""
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID
    )
    model.half().save_pretrained(partial)
    tokenizer.save(str(partial / "tokenizer.json"))
    write_json(
        partial / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
        },
    )
    write_json(partial / "training.json", training)
    partial.replace(output)
