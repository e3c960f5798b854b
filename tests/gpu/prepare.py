"""Cases for the GPU tests: `python -m tests.gpu.prepare DIRECTORY`, on any machine with torch.

Each is an exported checkpoint with what the CPU runtime computes from it, so that the machine with
the GPU needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from chain import Chain, build_chain, split_kind
from gpu.cases import BUNDLES, CASES, EXIT, LENGTH, RANK, SEED, SEQUENCES
from tiny_models import make_checkpoint

from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    make_bundles(directory / BUNDLES)
    for name, precision in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            variant, kind = split_kind(name.removesuffix("-fp16"))
            checkpoint = make_checkpoint(variant, Path(folder) / "checkpoint", seed=SEED)
            chain = build_chain(
                checkpoint,
                directory / name,
                precision=precision,
                max_length=2 * LENGTH,
                rank=RANK,
                kind=kind,
            )
            describe(chain, directory / name)
        print(name, flush=True)


def make_bundles(directory: Path) -> None:
    """Tiny bundles for a GPU to add its engines to, and the checkpoint and text they are of."""
    checkpoint = make_checkpoint("llama-gqa", directory / "checkpoint", seed=SEED)
    text = directory / "text.txt"
    text.write_text(inspect.getsource(argparse)[:30_000], encoding="utf-8")
    for precision in ("fp32", "fp16"):
        options = BuildOptions(
            str(checkpoint),
            directory / f"{precision}.ojfa",
            precision=precision,
            rank=RANK,
            shortcut="ojfa",
            calibration_data=(text,),
            calibration_tokens=1024,
            max_cache_length=2 * LENGTH,
            skip_verification=True,
        )
        build(options)


def describe(chain: Chain, directory: Path) -> None:
    """Writes the model's spec, its rotations, and what the CPU runtime computes."""
    spec = chain.spec
    rng = np.random.default_rng(SEED)
    ids = rng.integers(0, spec.vocab_size, (SEQUENCES, LENGTH)).astype(np.int32)
    rotary = chain.checkpoint.family.rotary(chain.checkpoint.config)
    tables = rotary.tables(chain.max_length) if rotary else None
    session = chain.session(SEQUENCES)
    arrays = {"token_ids": ids}
    for name, depth in (("exit", EXIT), ("full", spec.blocks)):
        every = (
            session.advance(ids.tolist(), depth, every_position=True)
            if name == "exit"
            else session.deepen(depth, every_position=True)
        )
        arrays[name] = np.stack(every)
    if tables is not None:
        arrays["cosines"], arrays["sines"] = tables
    np.savez(directory / "expected.npz", **arrays)
    described = {"spec": spec.model_dump(mode="json"), "precision": chain.precision}
    (directory / "case.json").write_text(json.dumps(described))


if __name__ == "__main__":
    main()
