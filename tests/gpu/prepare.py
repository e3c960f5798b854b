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

from chain import Chain, build_chain, random_blocks
from checked_programs import checked_tokens
from drafts import draft_for, open_draft
from elements import split_precision, split_weights
from gpu.cases import (
    BUNDLES,
    CASES,
    CHECKED,
    DRAFT_PROMPT,
    DRAFTED,
    DRAFTS,
    EACH,
    EXIT,
    LENGTH,
    RANK,
    SEED,
    SEQUENCES,
)
from shortcut_kinds import split_kind
from tiny_models import make_checkpoint

from ojfa_export.backends.onnxruntime.dialect import OnnxRuntimeCpu
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.draft_shortcut import rotations
from ojfa_export.bundle.shortcut_file import save
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.precision import Precision
from ojfa_export.runtime.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    make_bundles(directory / BUNDLES)
    for name, precision in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            before, form = split_weights(split_precision(name)[0])
            variant, kind = split_kind(before)
            # What products multiply isn't rounded to 8 bits: nor is it on a GPU.
            OnnxRuntimeCpu.accuracy_level = 4 if form is None else 1
            checkpoint = make_checkpoint(variant, Path(folder) / "checkpoint", seed=SEED)
            blocks = None
            if kind == "block":
                exits = 1, EXIT
                blocks = random_blocks(Checkpoint(checkpoint).spec, exits, each=name in EACH)
            chain = build_chain(
                checkpoint,
                directory / name,
                precision=precision,
                weights=form,
                max_length=2 * LENGTH,
                rank=RANK,
                kind=kind,
                shortcut=blocks,
                check_tokens=checked_tokens() if name in CHECKED else None,
            )
            describe(chain, directory / name)
            if name in DRAFTS:
                with_draft(chain, directory / name, own_head=DRAFTS[name])
        print(name, flush=True)


def make_bundles(directory: Path) -> None:
    """Tiny bundles for a GPU to add its engines to; checkpoint of those of 16 bits, and text.

    Exits of some are checked by a head of some tokens; one has blocks behind its exits.
    """
    make_checkpoint("llama-gqa", directory / "checkpoint", seed=SEED)
    make_checkpoint("qwen3", directory / "qwen3", seed=SEED)
    text = directory / "text.txt"
    text.write_text(inspect.getsource(argparse)[:30_000], encoding="utf-8")
    checkpoint, jump = Checkpoint(directory / "qwen3"), directory / "blocks.safetensors"
    blocks = random_blocks(checkpoint.spec, (1, EXIT), SEED, each=True)
    save(blocks, jump, checkpoint.sha256(), {"text": "made up"})
    made: dict[str, tuple[Precision, str, int, Path | None]] = {
        "fp32": ("fp32", "qwen3", 60, None),
        "fp16": ("fp16", "checkpoint", 0, None),
        "bf16": ("bf16", "checkpoint", 60, None),
        "blocks": ("fp16", "qwen3", 60, jump),
    }
    for name, (precision, model, checked, shortcut) in made.items():
        options = BuildOptions(
            str(directory / model),
            directory / f"{name}.ojfa",
            precision=precision,
            rank=None if shortcut else RANK,
            shortcut=shortcut or "ojfa",
            check_vocabulary=checked,
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
    if chain.check_tokens is not None:
        arrays["check_tokens"] = chain.check_tokens
    np.savez(directory / "expected.npz", **arrays)
    described = {"spec": spec.model_dump(mode="json"), "precision": chain.precision}
    if isinstance(chain.shortcut, BlockShortcut):
        described |= {"exits": chain.shortcut.exits, "exit_blocks": chain.shortcut.blocks}
    described["quantised"] = chain.weights is not None
    (directory / "case.json").write_text(json.dumps(described))


def with_draft(chain: Chain, directory: Path, *, own_head: bool) -> None:
    """Exports a draft layer, and writes what it says after a prompt and along a chain."""
    draft = draft_for(chain.spec, SEED, own_head=own_head)
    with tempfile.TemporaryDirectory() as folder:
        layer = open_draft(chain, draft, Path(folder))
        session = Session(chain.spec, chain.engines, 1, LENGTH, drafts=layer)
        ids = np.random.default_rng(SEED).integers(0, chain.spec.vocab_size, LENGTH).tolist()
        session.advance(ids[:DRAFT_PROMPT])
        stop = DRAFT_PROMPT + DRAFTED
        logits = [session.propose_logits([[token]])[0] for token in ids[DRAFT_PROMPT:stop]]
    cos, sin = rotations(draft.rope_theta, draft.head_dim, 0, chain.max_length)
    arrays = {"token_ids": np.array(ids, np.int32), "logits": np.stack(logits)}
    if draft.tokens is not None:
        arrays["tokens"] = draft.tokens
    np.savez(
        directory / "draft.npz", cos=cos.astype(np.float32), sin=sin.astype(np.float32), **arrays
    )
    spec = draft.spec_within(chain.spec).model_dump(mode="json")
    described = {"spec": spec, "depths": list(draft.depths)}
    (directory / "draft.json").write_text(json.dumps(described))


if __name__ == "__main__":
    main()
