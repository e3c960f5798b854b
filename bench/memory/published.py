"""Checkpoints of exactly the paper's models' configurations, with random weights in fp16.

    python -m bench.memory.published gpt2-xl -o xl
    python -m bench.memory.published llama-2-7b --blocks 2 -o llama

What a build takes in memory and whether every step of it works depend on shapes alone; with
`--blocks` a model fits machines that are too small for the whole. The tokenizer is the demo
checkpoint's, whose ids all of these models have.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.cpu.shapes import DEMO

# Each named like its recipe; as the hub's config.json has them where transformers' defaults differ.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "phi-3-mini": (
        "phi3",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "sliding_window": 2047,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
    ),
    "llama-2-7b": (
        "llama",
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a random checkpoint of a published shape.")
    parser.add_argument("name", choices=PUBLISHED)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to make")
    options = parser.parse_args(arguments)
    family, fields = PUBLISHED[options.name]
    config = transformers.AutoConfig.for_model(family, **fields)
    if options.blocks:
        config.num_hidden_layers = options.blocks
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    options.output.mkdir(parents=True)
    model.save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, options.output / name)


if __name__ == "__main__":
    main()
