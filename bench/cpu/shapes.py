"""The models that are raced: checkpoints of a given shape, made on the spot with random weights.

Decode time depends on shapes alone, so random weights will do; the demo checkpoint is taken as it
is where it exists.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

DEMO = Path(__file__).parents[2] / "calibration" / "demo" / "checkpoint"
MAX_POSITIONS = 1024


@dataclass(frozen=True)
class Shape:
    """A model shape.

    Attributes:
        family: transformers' `model_type`.
        config: Fields of its config.
        trained: A checkpoint of this shape to use instead of random weights.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    trained: Path | None = None


def _llama(
    hidden: int, blocks: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


SHAPES: dict[str, Shape] = {
    "demo": Shape("llama", _llama(192, 12, 6, 2, 32, 512, 4096), trained=DEMO),
    # GPT-2's own sizes are transformers' defaults.
    "gpt2-small": Shape("gpt2"),
    "smollm2": Shape("llama", _llama(576, 30, 9, 3, 64, 1536, 49152)),
    # Llama 3.2 1B's block; its 16 blocks and 128k tokens are cut to what memory and time allow.
    "llama-1b-block": Shape("llama", _llama(2048, 4, 32, 8, 64, 8192, 32000)),
}


def make_checkpoint(shape: Shape, directory: Path) -> None:
    """Writes the shape's checkpoint in fp32: config.json, model.safetensors, tokenizer.json.

    Every contestant reads the same file, so a trained checkpoint is widened to fp32 as well. The
    tokenizer is the demo checkpoint's, or a small one: benchmarks feed token ids.
    """
    directory.mkdir(parents=True)
    if shape.trained is not None and (shape.trained / "model.safetensors").exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            shape.trained, dtype=torch.float32
        )
    else:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(shape.family, **shape.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    _write_tokenizer(directory)


def _write_tokenizer(directory: Path) -> None:
    if (DEMO / "tokenizer.json").exists():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / name, directory / name)
        return
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
