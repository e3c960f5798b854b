"""Trains the demo checkpoint: a small Llama-family model of Python code.

The text is the standard library's source, the objective the plain next-token cross-entropy, the
result an ordinary Hugging Face directory:

    python calibration/demo/train.py --steps 100000 --seconds 105 -o checkpoint

It needs torch, transformers, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from calibration.training.command import add_options, check_options, train_checkpoint
from calibration.training.corpus import split
from calibration.training.models import build_llama
from calibration.training.stdlib import read_stdlib
from calibration.training.tokens import train_tokenizer


def main() -> None:
    """Collects the text, trains tokenizer and model, and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")), help="source directory")
    add("--held-out-share", type=float, default=0.06, help="share of the files (default 0.06)")
    add_options(parser, dropout=0.2)
    arguments = parser.parse_args()
    check_options(parser, arguments)
    if not 0 < arguments.held_out_share < 1:
        parser.error("--held-out-share must lie between 0 and 1")
    corpus = split(read_stdlib(arguments.stdlib), arguments.held_out_share)
    settings = {"held_out_share": arguments.held_out_share}
    train_checkpoint(
        build_llama, train_tokenizer(corpus.train), {"code": corpus}, arguments, settings
    )


if __name__ == "__main__":
    main()
