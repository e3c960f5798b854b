"""What a step of `ojfa-export train` takes at a published model's shape, and how much memory.

    python -m bench.gpu.training --shape llama2-7b --kind mlp --kind block --kind draft --out FILE

Weights are random, in bf16, and the text is the demo's: neither changes what a step takes. Steps
are those of a training of 8 million tokens (16,384 tokens each), without the loss on held-out text
that is looked at every hundredth step. Needs torch, transformers and a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.commit import commit
from bench.gpu.machine import nvidia_smi
from bench.gpu.peers import make_model
from bench.gpu.shapes import SHAPES
from ojfa_export.models.calibration_text import read_source, shipped_text
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.tokenizer import read_tokenizer
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.machine import PACKAGES, describe_machine
from ojfa_export.training.divergence import learn
from ojfa_export.training.draw import draw
from ojfa_export.training.kinds import KINDS
from ojfa_export.training.kinds.jump import Jump
from ojfa_export.training.sizes import Sizes, choose
from ojfa_export.training.windows import TrainingText, cut, token_ids
from ojfa_export.writing.frozen import Frozen

DEMO = Path("calibration/demo/checkpoint")
LENGTH, TOKENS = 512, 8_000_000
WARM_UP = 2


def main() -> None:
    """Measures each kind, and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[n for n in SHAPES if SHAPES[n].family == "llama"])
    parser.add_argument("--kind", action="append", choices=list(KINDS), required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SHAPES[options.shape], Path(folder))
        frozen = Frozen(Checkpoint(Path(folder)), device)
        text = demo_text()
        rows = [measured(frozen, text, kind, options.steps) for kind in options.kind]
    result = {
        "commit": commit(),
        "machine": describe_machine((*PACKAGES, "torch", "transformers")),
        "gpu": nvidia_smi(),
        "shape": options.shape,
        "weights_bytes": sum(each.nbytes for each in frozen.model.parameters()),
        "kinds": rows,
    }
    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


def write_checkpoint(spec: ModelSpec, folder: Path) -> None:
    """A checkpoint of random weights in bf16, with the demo's tokenizer."""
    make_model(spec, "cuda", torch.bfloat16).save_pretrained(folder)
    torch.cuda.empty_cache()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)


def demo_text() -> TrainingText:
    """Windows of the text that ships, by the demo's tokenizer."""
    texts = [read_source(path) for path in shipped_text()]
    ids = token_ids(texts, read_tokenizer(DEMO), TOKENS)
    return cut([text.name for text in texts], ids, LENGTH, TOKENS)


def measured(frozen: Frozen, text: TrainingText, kind: str, steps: int) -> dict[str, Any]:
    """Tokens per second and peak memory of one kind's steps."""
    training, _ = text.held_out()
    jump = KINDS[kind].begin(frozen, text, KINDS[kind].choose(None, frozen.spec), 0)
    jump.to(frozen.device)
    outputs, left = len(jump.learned), frozen.memory_left
    sizes = choose(frozen.spec, TOKENS // LENGTH, LENGTH, 3, outputs, left)
    optimiser = torch.optim.AdamW(jump.parameters(), lr=1e-5, fused=True)
    jump.prepare(frozen.states(windows(text, training[:1])) for _ in range(1))
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(WARM_UP + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(frozen, jump, text, training, sizes, number)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = sizes.rows * LENGTH
    row = {
        "kind": kind,
        "parameters": jump.shortcut().parameters,
        "windows_at_once": sizes.rows_at_once,
        "step_tokens": tokens,
        "step_seconds": seconds[WARM_UP:],
        "tokens_per_second": tokens / float(np.median(seconds[WARM_UP:])),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }
    print(json.dumps(row), flush=True)
    return row


def windows(text: TrainingText, which: Any) -> torch.Tensor:
    """Windows [n, T] int64 of the text."""
    return torch.from_numpy(text.windows[which].astype(np.int64))


def step(
    frozen: Frozen, jump: Jump, text: TrainingText, training: Any, sizes: Sizes, number: int
) -> None:
    """Gradients of one step, as the training loop makes them."""
    given = max(text.given, jump.first)
    drawn = draw(0, number, sizes, training, LENGTH, given, jump.learned)
    rows, positions = drawn.tokens[:, 0], drawn.tokens[:, 1]
    for first in range(0, sizes.rows, sizes.rows_at_once):
        states = frozen.states(windows(text, drawn.windows[first : first + sizes.rows_at_once]))
        here = (rows >= first) & (rows < first + sizes.rows_at_once)
        places = (rows[here] - first).astype(np.int64) * LENGTH + positions[here]
        at = torch.from_numpy(places).to(frozen.device)
        learn(frozen, jump, states, drawn.outputs, at, 1 / len(rows), sizes.logits_rows)


if __name__ == "__main__":
    main()
