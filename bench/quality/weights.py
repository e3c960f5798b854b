"""Bundles of one checkpoint whose weights are stored otherwise: what each gives, costs and takes.

python -m bench.quality.weights CHECKPOINT fp32.ojfa int8.ojfa int4.ojfa --out FILE.json

Perplexity and agreement with the checkpoint in fp32 are of the same windows of text for all,
milliseconds per token of bursts that the bundles take turns in, at full depth and half of it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.cli.inspect import measure_quantised, measure_sizes
from ojfa_export.decoding.arrays import Int32
from ojfa_export.models.calibration_text import read_text, shipped_text
from ojfa_export.models.tokenizer import encode
from ojfa_export.planning.machine import describe_machine
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.session import Session
from ojfa_export.system.progress import SILENT
from ojfa_export.verify.quantised import WINDOW_TOKENS, measure_change

PAST, SETTLING, BURST = 128, 4, 24
WINDOWS_OF_TEXT = 4


def main() -> None:
    """Measures bundles, and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    models = {path.stem: Model(Bundle(path)) for path in arguments.bundles}
    ids = windows(next(iter(models.values())))
    rows = {name: described(model) for name, model in models.items()}
    for name, times in race(models, arguments.rounds).items():
        rows[name]["ms_per_token"] = times
    for name, model in models.items():
        change = measure_change(model, arguments.checkpoint, ids, SILENT)
        rows[name]["change"] = change.model_dump()
        print(name, json.dumps(rows[name]["ms_per_token"]), change, flush=True)
    result = {"commit": commit(), "machine": describe_machine(), "bundles": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def windows(model: Model) -> Int32:
    """Windows [n, tokens] from the middle of each text that ships."""
    length = min(WINDOW_TOKENS, model.manifest.cache.max_length)
    rows = []
    for path in shipped_text():
        text = "\n".join(read_text(path).documents)
        ids = encode(model.tokenizer, text[len(text) // 2 :][: 40 * length])
        ends = range(length, WINDOWS_OF_TEXT * length + 1, length)
        rows += [ids[end - length : end] for end in ends if end <= len(ids)]
    return np.array(rows, np.int32)


def described(model: Model) -> dict[str, Any]:
    """What a bundle's weights are, and their bytes."""
    weights = model.manifest.weights
    return {
        "weights": model.manifest.precision if weights is None else str(weights),
        "sizes": measure_sizes(model.bundle),
        "quantised_bytes": measure_quantised(model.bundle),
    }


def race(models: dict[str, Model], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per token by depth, of each bundle: medians over bursts of bursts' medians."""
    rng = np.random.default_rng(0)
    sessions = {name: Session(m.spec, m.engines, 1, 2 * PAST) for name, m in models.items()}
    prompt = rng.integers(0, next(iter(models.values())).spec.vocab_size, PAST).tolist()
    medians: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    names = list(models)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            blocks = models[name].spec.blocks
            for label, depth in (("full", blocks), ("half", blocks // 2)):
                times = burst(sessions[name], prompt, depth)
                medians[name].setdefault(label, []).append(float(np.median(times)))
    return {
        name: {label: float(np.median(each)) for label, each in found.items()}
        for name, found in medians.items()
    }


def burst(session: Session, prompt: list[int], depth: int) -> list[float]:
    """Milliseconds of steps after a prompt; the first few, which find cold caches, aside."""
    session.rewind(0)
    session.advance(prompt, depth)
    times = []
    for token in prompt[: SETTLING + BURST]:
        begin = time.perf_counter()
        session.advance([token], depth)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[SETTLING:]


if __name__ == "__main__":
    main()
