"""All that is said of a real model's exits and drafts, by one command: figures and pictures.

    python -m bench.quality.evidence SMOLLM2 --out evidence/              # trains: a GPU
    python -m bench.quality.evidence SMOLLM2 --out evidence/ --jumps DIR  # with what was trained

Trains jumps and a draft layer on what the model writes (agreement by exit of each kind, acceptance
of drafts), certifies what exits per token save of its text, builds a bundle with the MLP, the draft
layer and a promise of 10%, and measures its ways of decoding on questions. What was trained is in
DIR: KIND.safetensors, and KIND-TOKENS.npz of each. Steps whose results are there are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

QUESTIONS = Path(__file__).parents[1] / "serving" / "questions.txt"
KINDS = ("draft:8", "mlp:8", "block:2", "residual:2")
CHECKS = (1024, 4096, 8192)


def main() -> None:
    """Runs what isn't there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jumps", type=Path, metavar="DIR", help="what was trained before")
    parser.add_argument("--tokens", default="12M", help="that the model writes to train on")
    parser.add_argument("--exits", default="5,10,15,20,25", help="of blocks for each exit")
    parser.add_argument("--promise", default="0.1", help="share of tokens that may differ")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--most", type=int, default=12, help="questions")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    jumps = arguments.jumps or out / "jumps"
    if not jumps.exists():
        train(arguments, jumps)
    run_once(out / "promised.json", "bench.quality.promised", str(jumps), "--out")
    bundle = out / "bundle.ojfa"
    if not bundle.exists():
        build(arguments, jumps, bundle)
    ways = ("--backend", arguments.backend, "--chat", "--prompts", str(QUESTIONS))
    few = ("--most", str(arguments.most))
    run_once(out / "ways.json", "bench.quality.ways", str(bundle), *ways, *few, "--out")


def train(arguments: argparse.Namespace, jumps: Path) -> None:
    """All kinds, on text that the model writes."""
    options = ["--self-text", "--tokens", arguments.tokens, "--exits", arguments.exits]
    for kind in KINDS:
        options += ["--kind", kind]
    for check in CHECKS:
        options += ["--check", str(check)]
    kept = ["--keep", str(jumps), "--statistics", str(jumps)]
    result = arguments.out / "trained.json"
    run("bench.quality.trained", arguments.checkpoint, *options, *kept, "--out", str(result))


def build(arguments: argparse.Namespace, jumps: Path, bundle: Path) -> None:
    """A bundle with the MLP, the draft layer, and a promise on what the model writes."""
    given = [str(jumps / f"{kind}.safetensors") for kind in ("mlp", "draft")]
    shortcuts = [word for path in given for word in ("--shortcut", path)]
    promise = ["--max-disagreement", arguments.promise, "--self-text", "alone"]
    where = ["-o", str(bundle), "--backend", arguments.backend, "--skip-verification"]
    run("ojfa_export", "build", arguments.checkpoint, *where, *shortcuts, *promise)


def run_once(result: Path, module: str, *words: str) -> None:
    """Unless the result is there; its path is the last word."""
    if not result.exists():
        run(module, *words, str(result))


def run(module: str, *words: str) -> None:
    """A module's command, shown."""
    command: Sequence[str] = (sys.executable, "-m", module, *words)
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
