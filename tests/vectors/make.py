"""Writes the vectors of engines/tests/vectors: `python -m tests.vectors.make`, where torch is.

Five tiny bundles (a Llama with grouped heads and a narrow shortcut, a GPT-2 in fp16 with a
residual one, a Phi-3 with a window and LongRoPE, a Qwen3, a Gemma 3 with a softcap), and for each
what the Python runtime does in every way of decoding. What would come out otherwise on another
processor, for a near tie, is refused: every case must give the same with noise in its logits.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from noisy import Noisy
from vectors.cases import BUNDLES, DIRECTORY, Case, open_bundle, run_generation, run_steps

from ojfa_export.bundle.manifest import Manifest, read_manifest
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.decoding.default import Default
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.model import Model

SEED, LENGTH = 5, 64
# Noise relative to the largest logit: a hundred times what two orders of summation differ by.
NOISE, NOISY_RUNS = 3e-5, 4
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": 0, "max_length": LENGTH}

_SMALL = {"hidden_size": 32, "intermediate_size": 48}
VARIANTS = {
    "llama": tiny_models.Variant("llama", {**_SMALL, "num_key_value_heads": 2, "head_dim": 16}),
    "gpt2": tiny_models.Variant("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4}),
    "phi3": tiny_models.Variant(
        "phi3",
        {
            **_SMALL,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "sliding_window": 24,
            **tiny_models.VARIANTS["phi3-longrope"].config,
        },
    ),
    "qwen3": tiny_models.Variant("qwen3", {**_SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": tiny_models.Variant(
        "gemma3_text", {**_SMALL, "head_dim": 16, "final_logit_softcapping": 8.0}
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"shortcut": "ojfa"},
    "gpt2": {"shortcut": "residual", "precision": "fp16"},
    "phi3": {"shortcut": "ojfa"},
    "qwen3": {"shortcut": "residual"},
    "gemma3": {"shortcut": "ojfa"},
}


def main() -> None:
    for name in BUNDLES:
        make_bundle(name)
        model = open_bundle(name)
        generations = [
            case | {"gives": stable(model, case, run_generation)}
            for case in generation_cases(model)
        ]
        steps = [case | {"gives": stable(model, case, run_steps)} for case in step_cases(model)]
        write(f"{name}.json", {"generations": generations, "sessions": steps})
        print(name, len(generations), len(steps), flush=True)
    write("random.json", random_cases())


def make_bundle(name: str) -> None:
    """Builds a bundle without report and statistics, with a policy and a default."""
    target = DIRECTORY / f"{name}.ojfa"
    shutil.rmtree(target, ignore_errors=True)
    tiny_models.VARIANTS[name] = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_models.make_checkpoint(name, Path(folder) / "checkpoint", seed=SEED)
        text = Path(folder) / "text.txt"
        text.write_text(Path(tiny_models.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        options = BuildOptions(
            str(checkpoint),
            target,
            rank=8,
            calibration_data=(text,),
            calibration_tokens=1024,
            max_cache_length=LENGTH,
            max_batch_size=4,
            skip_verification=True,
            **SETTINGS[name],
        )
        build(options)
    manifest = read_manifest(target)
    kept = {
        path: entry
        for path, entry in manifest.files.items()
        if not path.startswith("report/") and path != "statistics.npz"
    }
    for path in set(manifest.files) - set(kept):
        (target / path).unlink()
    shutil.rmtree(target / "report", ignore_errors=True)
    host = manifest.built.model_copy(update={"host": "vectors"})
    manifest = manifest.model_copy(update={"files": kept, "built": host})
    rewrite(target, manifest)
    model = open_bundle(name)
    planned = Default(
        exit="full",
        speculation=Speculation(exit=3, check_cost=0.05, acceptance=0.8),
        ms_per_token=0.5,
        full_ms_per_token=1.0,
        reason="for the vectors",
    )
    rewrite(target, manifest.model_copy(update={"auto": middling(model), "default": planned}))


def rewrite(bundle: Path, manifest: Manifest) -> None:
    (bundle / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def middling(model: Model, measure: Any = "top", exits: tuple[int, ...] = (1, 2, 3)) -> ExitPolicy:
    """A policy whose thresholds stop some tokens at each exit."""
    never = ExitPolicy(exits=exits, measure=measure, thresholds=(9.0,) * len(exits))
    session = model.session(1, LENGTH)
    said = []
    for token in np.random.default_rng(1).integers(1, model.spec.vocab_size, 30).tolist():
        said.append(session.decide([[token]], never).confidence[:, 0])
    thresholds = np.quantile(np.array(said), 0.6, axis=0)
    return ExitPolicy(
        exits=exits, measure=measure, thresholds=tuple(round(float(x), 3) for x in thresholds)
    )


def generation_cases(model: Model) -> list[Case]:
    rng = np.random.default_rng(SEED)

    def prompts(*lengths: int) -> list[list[int]]:
        return [rng.integers(1, model.spec.vocab_size, n).tolist() for n in lengths]

    def case(name: str, exit: Any, lengths: tuple[int, ...] = (7,), **other: Any) -> Case:
        asked = {**GREEDY, "max_new_tokens": 20, **other}
        return {"name": name, "prompts": prompts(*lengths), "exit": exit, **asked}

    sampled = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 3}
    margin, entropy = (
        middling(model, kind, (2,)).model_dump(mode="json") for kind in ("margin", "entropy")
    )
    return [
        case("full", "full"),
        case("fixed", 2),
        case("fixed, a batch", 3, (5, 9, 1)),
        case("cache full", "full", (5, 8), max_length=14),
        case("past the switch of LongRoPE", 2, (20,), max_new_tokens=30),
        case("auto", "auto", (12,)),
        case("auto, a batch", "auto", (5, 9, 1), max_new_tokens=16),
        case("margin", margin),
        case("entropy", entropy, (4, 6)),
        case("sampled", "full", (6, 6), **sampled),
        case("sampled by temperature alone", 3, temperature=1.2, seed=2**40 + 1),
        case("sampled, auto", "auto", temperature=1.0, top_p=0.8, seed=9),
        case("speculation", "full", speculation={"exit": 3}),
        case("speculation, a batch", "full", (5, 9), speculation={"exit": 2, "draft": 3}),
        case("speculation, sampled", "full", speculation={"exit": 3, "draft": 2}, **sampled),
        case("default", "default"),
        case("shadow checks", "auto", (6, 3), shadow={"share": 0.5, "seed": 11}),
    ]


def step_cases(model: Model) -> list[Case]:
    rng = np.random.default_rng(SEED + 1)
    full = model.blocks

    def ids(count: int) -> list[int]:
        return rng.integers(1, model.spec.vocab_size, count).tolist()

    policy = middling(model).model_dump(mode="json")
    one = [
        {"do": "advance", "tokens": [ids(5)], "exit": 2},
        {"do": "advance", "tokens": [ids(1)], "exit": 1},
        {"do": "advance", "tokens": [ids(2)], "exit": 3},
        {"do": "advance", "tokens": [ids(1)], "exit": full},
        {"do": "decide", "tokens": [ids(1)], "policy": policy},
        {"do": "decide", "tokens": [ids(3)], "policy": policy},
        {"do": "rewind", "length": 9, "row": 0},
        {"do": "advance_every", "tokens": [ids(4)], "exit": 2},
        {"do": "complete", "tokens": [ids(1)], "counts": [3]},
        {"do": "advance", "tokens": [ids(25)], "exit": 2},
        {"do": "deepen", "exit": 3},
        {"do": "rewind", "length": 20, "row": 0},
        {"do": "advance", "tokens": [ids(1)], "exit": full},
    ]
    three = [
        {"do": "advance", "tokens": [ids(4), [], ids(2)], "exit": full},
        {"do": "advance", "tokens": [ids(1), ids(3), ids(1)], "exit": 2},
        {"do": "advance", "tokens": [ids(1), ids(1), ids(1)], "exit": full},
        {"do": "advance", "tokens": [ids(1), ids(1), ids(1)], "exit": 1},
        {"do": "advance", "tokens": [ids(1), [], ids(1)], "exit": 3},
        {"do": "decide", "tokens": [ids(1), ids(1), []], "policy": policy},
        {"do": "complete", "tokens": [[], ids(1), ids(1)], "counts": [0, 2, 1]},
        {"do": "deepen", "exit": full},
        {"do": "rewind", "length": 0, "row": 1},
        {"do": "advance_every", "tokens": [ids(2), ids(4), []], "exit": full},
    ]
    return [
        {"name": "one sequence", "batch_size": 1, "max_length": LENGTH, "steps": one},
        {"name": "three sequences", "batch_size": 3, "max_length": 40, "steps": three},
    ]


def stable(model: Model, case: Case, run: Callable[[Model, Case], Any]) -> Any:
    """What a case gives, where noise doesn't change its choices."""
    expected, engines = run(model, case), model.engines
    for seed in range(NOISY_RUNS):
        model.engines = Noisy(engines, seed, NOISE)
        try:
            noisy = run(model, case)
        finally:
            model.engines = engines
        if choices(noisy) != choices(expected):
            raise SystemExit(f"case '{case['name']}' has a near tie: change SEED or its prompts")
    return expected


def choices(result: Any) -> Any:
    """A result without its numbers with a fraction."""
    if isinstance(result, dict):
        return {key: choices(value) for key, value in result.items()}
    if isinstance(result, list):
        return [choices(value) for value in result]
    return None if isinstance(result, float) else result


def random_cases() -> list[Case]:
    """Random numbers and draws of NumPy's, which sampling and shadow checks are made of."""
    weights = (np.arange(1, 11) / 55).tolist()
    cases = []
    for entropy, key in (([0, 0], []), ([3, 1], []), ([2**40 + 1, 2], []), ([11], [0]), ([7], [5])):
        generator = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=key))
        uniform = [generator.random() for _ in range(5)]
        drawn = [int(generator.choice(len(weights), p=weights)) for _ in range(12)]
        cases.append({"entropy": entropy, "spawn_key": key, "uniform": uniform, "drawn": drawn})
    logits = np.random.default_rng(2).normal(size=12).astype(np.float32).round(3)
    logits[5] = logits[2]  # equal ones are ranked by their ids
    cuts: list[Case] = []
    settings = ((0.7, None, 1.0), (1.0, 3, 1.0), (1.3, None, 0.6), (1.0, 5, 0.5))
    for temperature, top_k, top_p in settings:
        sampling = Sampling(temperature, top_k, top_p)
        cuts.append(
            {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "probabilities": sampling.probabilities(logits).tolist(),
            }
        )
    return [{"weights": weights, "generators": cases, "logits": logits.tolist(), "cuts": cuts}]


def write(name: str, document: Any) -> None:
    (DIRECTORY / name).write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    main()
