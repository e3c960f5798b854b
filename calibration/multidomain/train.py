"""Trains a GPT-2 or a Phi-3 of 8.2 M parameters on the text that prepare.py collected.

    python calibration/multidomain/train.py gpt2 --text text --seconds 120 -o checkpoint

The objective is the plain next-token cross-entropy, the result an ordinary Hugging Face directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from calibration.multidomain.prepare import read_corpus
from calibration.training.command import add_options, check_options, train_checkpoint
from calibration.training.models import build_gpt2, build_phi3

FAMILIES = {"gpt2": build_gpt2, "phi3": build_phi3}


def main() -> None:
    """Reads the text, trains the model of the family, and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("family", choices=FAMILIES)
    add("--text", type=Path, required=True, help="directory that prepare.py wrote")
    add_options(parser, dropout=0.05)
    arguments = parser.parse_args()
    check_options(parser, arguments)
    corpus, vocabulary = arguments.text / "corpus.json.xz", arguments.text / "tokenizer.json"
    if not corpus.is_file() or not vocabulary.is_file():
        parser.error(f"{arguments.text} lacks corpus or tokenizer; prepare.py writes both")
    train_checkpoint(
        FAMILIES[arguments.family],
        Tokenizer.from_file(str(vocabulary)),
        read_corpus(corpus),
        arguments,
        {"family": arguments.family},
    )


if __name__ == "__main__":
    main()
