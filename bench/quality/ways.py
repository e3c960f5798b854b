"""Ways of decoding a bundle, measured: ms/token against agreement with the full model.

    python -m bench.quality.ways BUNDLE --chat --prompts bench/serving/questions.txt \
        --out bench/results/ways-smollm2.json

Greedy answers at full depth, at fixed exits, with exits per token (the bundle's promise), and
with drafts of its draft layer, prompt by prompt in turns. A way's agreement is the share of tokens
of its own answers that are the full model's choice after what was written before them. FILE.png
shows both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.commit import commit
from bench.serving.drafts import generated, read_prompts
from ojfa_export import backends
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.planning.machine import describe_machine
from ojfa_export.runtime.model import Model, load
from ojfa_export.system.pictures import png

ROWS = 128  # of logits at a time
COLOURS = {"full": "#333333", "exit": "#0072B2", "auto": "#D55E00", "drafts": "#CC79A7"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, records and draws."""
    options = _parser().parse_args(arguments)
    model = load(options.bundle, backend=options.backend)
    rows = measured(model, read_prompts(model, options), options)
    document = {
        "commit": commit(),
        "machine": describe_machine(backend=backends.load(options.backend)),
        "model": model.manifest.model.name,
        "tokens_each": options.new,
        "ways": rows,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".png").write_bytes(draw(document))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--prompts", type=Path, required=True, help="a prompt in each line")
    parser.add_argument("--chat", action="store_true", help="a line is a user's message")
    parser.add_argument("--most", type=int, help="prompts at most")
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--exits", type=int, nargs="*", default=[], help="fixed exits as well")
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser


def ways_of(model: Model, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What there is to measure, by name; the first word is the kind."""
    ways: dict[str, dict[str, Any]] = {"full depth": {"exit": "full"}}
    ways |= {f"exit {depth}": {"exit": depth} for depth in options.exits}
    promise = model.manifest.promise
    if promise is not None and promise.policy is not None:
        ways[f"auto, at most {promise.limits.max_disagreement:.0%} differ"] = {"exit": "auto"}
    if model.drafts is not None:
        ways |= {
            f"drafts, {count}": {"speculate": Speculation(0, count)} for count in options.drafts
        }
    return ways


def measured(
    model: Model, prompts: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Each way's times and agreement."""
    ways = ways_of(model, options)
    for how in ways.values():
        generated(model, 16, how, [prompts[0]])  # loads and records what it needs
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for prompt in prompts:
        for name, how in ways.items():
            answers[name].append(generated(model, options.new, how, [prompt]))
    full = np.array([each["ms_per_token"] for each in answers["full depth"]])
    rows = []
    for name, each in answers.items():
        ms = np.array([answer["ms_per_token"] for answer in each])
        agrees = [
            agreement(model, prompt, answer["token_ids"][0])
            for prompt, answer in zip(prompts, each, strict=True)
        ]
        rows.append(
            {
                "way": name,
                "ms_per_token": float(ms.mean()),
                "saves": 1 - float(ms.sum() / full.sum()),
                "agreement": float(np.mean(agrees)),
                "equal_answers": sum(
                    answer["token_ids"] == plain["token_ids"]
                    for answer, plain in zip(each, answers["full depth"], strict=True)
                ),
                "answers": len(each),
                "samples_ms": ms.round(4).tolist(),
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "samples_ms"}, flush=True)
    return rows


def agreement(model: Model, prompt: str, answer: Sequence[int]) -> float:
    """The share of an answer's tokens that the full model would choose at their places."""
    given = model.encode(prompt)
    tokens = [*given, *answer]
    chunks = [Chunk(0, 0, len(tokens))]
    executor = model.engines.executor(1, len(tokens))
    hidden = executor.embed(tokens, chunks)
    hidden = executor.run(range(model.blocks), hidden, chunks, long_context=False)
    hidden = executor.arrays.ascontiguousarray(hidden[len(given) - 1 : -1])
    chosen: list[int] = []
    for start in range(0, len(answer), ROWS):
        logits = model.engines.logits(hidden[start : start + ROWS], model.blocks)
        chosen += logits.argmax(axis=-1).tolist()
    return float(np.mean(np.array(chosen) == np.array(answer)))


def draw(document: Mapping[str, Any]) -> bytes:
    """A bar for each way, with its agreement: a PNG file's bytes."""
    rows = document["ways"]
    figure = Figure(figsize=(7, 0.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        kind = row["way"].split()[0].rstrip(",")
        axes.barh(place, row["ms_per_token"], color=COLOURS[kind], height=0.65)
        said = f"{row['ms_per_token']:.1f} ms, {row['agreement']:.1%} agree"
        axes.annotate(
            said,
            (row["ms_per_token"], place),
            color="white",
            textcoords="offset points",
            xytext=(-6, 0),
            ha="right",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(rows)), [row["way"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms per token")
    axes.set_title(f"{document['model']}: ways of decoding, on its answers")
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


if __name__ == "__main__":
    main()
