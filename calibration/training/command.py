"""What the training scripts share: their options, and the run from text to checkpoint."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from calibration.training.checkpoint import write_checkpoint
from calibration.training.corpus import Corpus, merge
from calibration.training.loop import Run, Schedule, held_out_loss, train
from calibration.training.models import MAX_POSITIONS
from calibration.training.tokens import encode

_RECORDED = ("batch", "context", "learning_rate", "dropout", "seed")


def add_options(parser: argparse.ArgumentParser, *, dropout: float) -> None:
    """Adds the options of every training script; `dropout` is the default of its option."""
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="checkpoint directory to create")
    add("--seconds", type=float, default=math.inf, help="time budget after the first step")
    add("--steps", type=int, default=20_000, help="most optimiser steps (default 20000)")
    add("--batch", type=int, default=128, help="windows per step (default 128)")
    add("--context", type=int, default=512, help="tokens per window (default 512)")
    add("--learning-rate", type=float, default=3e-3, help="peak (default 3e-3)")
    add("--dropout", type=float, default=dropout, help="on blocks' additions (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses, as a usage error, what could only fail later."""
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; remove it or choose another --output")
    if not 0 < arguments.context < MAX_POSITIONS:
        parser.error(f"--context must lie in 1..{MAX_POSITIONS - 1}")


def train_checkpoint(
    build: Callable[[int, float], PreTrainedModel],
    tokenizer: Tokenizer,
    domains: Mapping[str, Corpus],
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
) -> None:
    """Trains a model on all domains together and writes the checkpoint.

    Args:
        build: Makes the model from the vocabulary's size and the dropout.
        tokenizer: The tokenizer of the checkpoint.
        domains: Text by the name of its domain.
        arguments: The values of `add_options`.
        settings: Further facts that training.json records.

    Raises:
        SystemExit: There is less text than one window.
    """
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    train_parts = {name: encode(tokenizer, text.train) for name, text in domains.items()}
    held_out = {name: encode(tokenizer, text.held_out).to(device) for name, text in domains.items()}
    train_tokens = torch.cat(list(train_parts.values())).to(device)
    held_out_tokens = torch.cat(list(held_out.values()))
    counts = {"train": train_tokens.numel(), "held_out": held_out_tokens.numel()}
    if min(counts.values()) <= arguments.context + 1:
        raise SystemExit("error: too little text for windows of --context tokens")
    model = build(tokenizer.get_vocab_size(), arguments.dropout).to(device)
    print(f"tokens {counts}; {model.num_parameters()} parameters", flush=True)
    run = train(
        model,
        train_tokens,
        held_out_tokens,
        Schedule(arguments.seconds, arguments.steps, arguments.learning_rate),
        context=arguments.context,
        batch=arguments.batch,
    )
    model.load_state_dict(run.best_weights)
    model.half().float()  # the loss to report is that of the weights as stored
    quality = _quality(model, held_out_tokens, merge(domains.values()), arguments)
    facts = {
        **quality,
        "parameters": model.num_parameters(),
        **_run_facts(run),
        "settings": {name: getattr(arguments, name) for name in _RECORDED}
        | dict(settings)
        | {"device": torch.cuda.get_device_name() if device.type == "cuda" else device.type},
        "versions": _versions(),
        "text": _text_facts(merge(domains.values()), counts),
        "domains": {
            name: {
                "train_tokens": train_parts[name].numel(),
                **_quality(model, held_out[name], text, arguments),
                **_amounts(text),
            }
            for name, text in domains.items()
        },
    }
    write_checkpoint(arguments.output, model, tokenizer, facts)
    loss = quality["held_out_loss_nats_per_token"]
    print(f"held-out loss {loss:.4f} nats/token; wrote {arguments.output}", flush=True)


def _quality(
    model: PreTrainedModel, tokens: torch.Tensor, text: Corpus, arguments: argparse.Namespace
) -> dict[str, float]:
    """Held-out loss of `tokens`, which encode the held-out part of `text`."""
    loss = held_out_loss(model, tokens, arguments.context, arguments.batch)
    size = sum(len(document.text.encode()) for document in text.held_out)
    return {
        "held_out_loss_nats_per_token": loss,
        "held_out_bits_per_byte": loss * (tokens.numel() - 1) / (math.log(2) * size),
        "held_out_tokens": tokens.numel(),
    }


def _amounts(text: Corpus) -> dict[str, int]:
    return {
        "train_files": len(text.train),
        "train_bytes": sum(len(document.text.encode()) for document in text.train),
        "held_out_bytes": sum(len(document.text.encode()) for document in text.held_out),
    }


def _run_facts(run: Run) -> dict[str, Any]:
    return {
        "training_loss_nats_per_token": run.training_loss,
        "steps": run.steps,
        "tokens_seen": run.tokens,
        "seconds": run.seconds,
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "tokenizers": tokenizers_version,
    }


def _text_facts(text: Corpus, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "digest": text.digest,
        **_amounts(text),
        "train_tokens": counts["train"],
        "held_out_tokens": counts["held_out"],
        "held_out_files": [document.path for document in text.held_out],
    }
