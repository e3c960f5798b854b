"""Promises made on files, on what the model writes, and on both: what is kept of them, and where.

python -m bench.quality.self_text BUNDLE --checkpoint DIR --text code=FILE --text docs=FILE \
    --out bench/results/self-text-demo.json

BUNDLE was built from DIR with --max-disagreement and --self-text beside; FILE is text that the
build didn't see. Policies are certified from the bundle's statistics, for each limit
and each text, and checked on fresh files, on text that the full model writes with another seed, and
on text that the policy itself writes, sampled and greedily. Every token counts that a build samples
of windows of that length. Costs are counted in blocks: they decide which exits are worthwhile, not
what is certified.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.commit import commit
from ojfa_export.bundle.names import STATISTICS
from ojfa_export.bundle.promise import Limits, Promise
from ojfa_export.cli.progress import Lines
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.self_text import SelfText
from ojfa_export.decoding.arrays import Int32
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.models.calibration_text import read_source
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.tokenizer import encode_all
from ojfa_export.planning.machine import PACKAGES, describe_machine
from ojfa_export.promises.certify import certify
from ojfa_export.promises.collect import collect_statistics
from ojfa_export.promises.outcomes import Costs, apply
from ojfa_export.promises.self_text import DOMAIN
from ojfa_export.promises.statistics import ExitStatistics, load_statistics
from ojfa_export.runtime.model import Model, load
from ojfa_export.writing.frozen import Frozen
from ojfa_export.writing.self_text import TEMPERATURE, TOP_P, write

LIMITS = (0.05, 0.1)
# In blocks: a check of an exit, and the model's own head.
CHECK, HEAD = 0.1, 0.5
FILE_TOKENS = 512
# Of what the model writes to check on: no build's, and no training's.
FRESH_SEED = 0x66726573 << 32


def main() -> None:
    """Certifies, writes, checks, and records."""
    arguments = _arguments()
    before = commit()
    with tempfile.TemporaryDirectory() as temporary:
        document = run(arguments, Path(temporary))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"commit": before, **document}, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--calibration-tokens", type=int, help="if the build was given them")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--windows", type=int, default=128, help="of each text to check on")
    parser.add_argument("--written", type=int, default=64, help="windows that each policy writes")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Everything, without the commit."""
    model, inputs = load(arguments.bundle), inputs_of(arguments, directory)
    plan = inputs.self_text
    assert plan is not None
    bench = Bench(model, plan, directory)
    files = [windows_of(model, path, arguments.windows) for path in arguments.text]
    fresh = bench.fresh(inputs.checkpoint, arguments.windows)
    given = plan.starts.given
    texts = {
        read_source(path).domain: bench.statistics(each, 0)
        for path, each in zip(arguments.text, files, strict=True)
    }
    texts[DOMAIN] = bench.statistics(fresh, given)
    rows = []
    for limit in LIMITS:
        for made_on, promise in bench.promises(limit).items():
            row = {"limit": limit, "made_on": made_on, "promise": promise.model_dump(mode="json")}
            if promise.policy is not None:
                checked = {name: bench.loss(each, promise.policy) for name, each in texts.items()}
                prompts = fresh[: arguments.written, :given]
                for sample in (True, False):
                    name = f"auto, {'sampled' if sample else 'greedy'}"
                    wrote = bench.statistics(bench.write(promise.policy, prompts, sample), given)
                    checked[name] = bench.loss(wrote, promise.policy)
                row["checked"] = checked
            rows.append(row)
            print(made_on, limit, promise.reason, row.get("checked"), flush=True)
    return {
        "machine": describe_machine((*PACKAGES, "torch", "transformers")),
        "model": Path(arguments.checkpoint).resolve().parent.name,
        "costs_in_blocks": {"check": CHECK, "head": HEAD},
        "self_text": plan.about,
        "promises": rows,
    }


def inputs_of(arguments: argparse.Namespace, directory: Path) -> Inputs:
    """What the build read, as far as it decides how the model's windows begin."""
    options = BuildOptions(
        arguments.checkpoint,
        directory / "unused.ojfa",
        calibration_tokens=arguments.calibration_tokens,
        max_disagreement=max(LIMITS),
        self_text="alone",
    )
    return Inputs(options)


def windows_of(model: Model, path: Path, count: int) -> Int32:
    """At most so many windows, evenly spread over a file."""
    documents = read_source(path).documents
    ids = np.concatenate([np.array(i, np.int32) for i in encode_all(model.tokenizer, documents)])
    windows = ids[: len(ids) // FILE_TOKENS * FILE_TOKENS].reshape(-1, FILE_TOKENS)
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(np.int64)]


def of_domains(statistics: ExitStatistics, names: Sequence[str]) -> ExitStatistics:
    """The windows of some domains."""
    numbers = [statistics.domains.index(name) for name in names]
    some = statistics.select(np.flatnonzero(np.isin(statistics.domain, numbers)))
    domain = np.array([numbers.index(int(each)) for each in some.domain], np.int16)
    return replace(some, domains=tuple(names), domain=domain)


class Bench:
    """A bundle, and what its exits say on texts."""

    def __init__(self, model: Model, plan: SelfText, directory: Path) -> None:
        self._model, self._plan, self._directory = model, plan, directory
        self._costs = Costs.even(model.blocks, 1.0, CHECK, HEAD)
        self._splits = load_statistics(model.bundle.path(STATISTICS))
        self._progress = Lines(sys.stderr)

    def promises(self, limit: float) -> dict[str, Promise]:
        """What can be promised, by what it is made on."""
        domains = self._splits["tuning"].domains
        files = [name for name in domains if name != DOMAIN]
        found = {}
        for made_on, names in (("files", files), (DOMAIN, [DOMAIN]), ("both", list(domains))):
            tuning, certification = (
                of_domains(self._splits[split], names) for split in ("tuning", "certification")
            )
            limits = Limits(max_disagreement=limit)
            found[made_on] = certify(tuning, certification, limits, self._costs)
        return found

    def fresh(self, checkpoint: Checkpoint, windows: int) -> Int32:
        """Text that the full model writes, as for the build but with another seed."""
        plan = self._plan
        frozen = Frozen(checkpoint, torch.device(plan.device))
        tokens, directory = windows * plan.length, self._directory / "fresh"
        written = write(
            frozen, plan.starts, plan.length, tokens, FRESH_SEED, directory, self._progress
        )
        return written.windows

    def write(self, policy: ExitPolicy, prompts: Int32, sample: bool) -> Int32:
        """Windows that the policy writes from these beginnings."""
        new, most = self._plan.length - prompts.shape[1], self._model.manifest.cache.max_batch_size
        temperature, top_p = (TEMPERATURE, TOP_P) if sample else (0.0, None)
        rows: list[list[int]] = []
        for start in range(0, len(prompts), most):
            some = prompts[start : start + most].tolist()
            result = self._model.generate(
                some,
                exit=policy,
                max_new_tokens=new,
                ignore_eos=True,
                seed=start,
                temperature=temperature,
                top_p=top_p,
            )
            texts = zip(some, result.prompts, strict=True)
            rows += [prompt + list(each.token_ids) for prompt, each in texts]
        return np.array(rows, np.int32)

    def statistics(self, windows: Int32, given: int) -> ExitStatistics:
        """What every exit says on windows."""
        return collect_statistics(
            self._model.spec,
            lambda: self._model.engines,
            ["text"],
            [windows],
            self._directory,
            self._progress,
            np.random.default_rng(1),
            given=given,
        )

    def loss(self, statistics: ExitStatistics, policy: ExitPolicy) -> dict[str, float]:
        """The share of tokens that differ, and its standard error over windows."""
        outcome = apply(statistics, policy, self._costs, 10.0)
        losses = outcome.disagreement
        return {
            "windows": len(losses),
            "differ": float(losses.mean()),
            "standard_error": float(losses.std(ddof=1) / np.sqrt(len(losses))),
            "depth": float(outcome.depth.mean()),
        }


if __name__ == "__main__":
    main()
