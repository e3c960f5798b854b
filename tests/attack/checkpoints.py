"""Hostile checkpoints: `build --dry-run` refuses what `build` would, and nothing wrong is built.

Where `--dry-run` accepts a checkpoint, `build` may not refuse it for what a look at the files could
have told (`Hostile.late`: NaN among the weights is found when they are read). What is built must
pass `verify`; what must not be built at all says so (`Hostile.refuse`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from . import hostile_configs, hostile_weights
from .bundles import Rng, Verdict
from .child import run_cli, run_forked
from .damages import make_special
from .hostile import Hostile
from .hostile_tokenizers import spoil_tokenizer
from .judge import Fault, judge_outcome

COUNT = 120
BASES = {"llama-gqa": 1, "gpt2": 1, "phi3-longrope": 1, "llama-tied": 3}  # name: shards
BUILD_SECONDS = 40.0


def make_bases(directory: Path) -> None:
    """Writes the sound checkpoints; in a process of its own, which may import torch."""

    def body() -> None:
        from tiny_models import make_checkpoint

        for name, shards in BASES.items():
            make_checkpoint(name, directory / name, seed=13, shards=shards)

    outcome = run_forked("make checkpoints", body, seconds=300)
    assert outcome.status == 0, outcome.stderr
    (directory / "text.txt").write_text(_text(), encoding="utf-8")


def _text() -> str:
    import argparse
    import inspect

    return inspect.getsource(argparse)


def build_arguments(checkpoint: str, output: str, text: Path, *more: str) -> list[str]:
    """A build of a tiny checkpoint that takes seconds."""
    return [
        *("-q", "build", checkpoint, "-o", output, "--rank", "8", "--shortcut", "ojfa"),
        *("--calibration-data", str(text), "--calibration-tokens", "1024"),
        *("--max-cache-length", "64", "--skip-verification", *more),
    ]


def attack(number: int, rng: Rng, directory: Path, bases: Path) -> Verdict:
    """Makes a checkpoint hostile, and judges what `build` says of it."""
    name = sorted(BASES)[rng.integers(len(BASES))]
    hostile = Hostile(directory / name, str(directory / "out.ojfa"))
    shutil.copytree(bases / name, hostile.directory)
    what = ATTACKS[number % len(ATTACKS)](hostile, rng)
    verdict = Verdict(f"{name}: {what}", "refused")
    checkpoint = str(hostile.directory)

    def build(*more: str, seconds: float) -> int | None:
        arguments = build_arguments(checkpoint, hostile.output, bases / "text.txt", *more)
        outcome = run_cli(*arguments, seconds=seconds)
        verdict.faults += judge_outcome(outcome)
        return outcome.status

    planned = build("--dry-run", seconds=10)
    if planned is None or (planned != 0 and number % 4):
        return verdict
    built = build(seconds=BUILD_SECONDS)
    output = Path(hostile.output)
    partial = output.with_name(f"{output.name}.partial")
    if built == 0:
        _judge_built(verdict, hostile)
    elif planned == 0 and not hostile.late:
        verdict.faults.append(Fault("silently wrong", "--dry-run takes what build refuses"))
    elif planned != 0 and os.path.lexists(partial):
        verdict.faults.append(Fault("untidy", f"{partial.name} is left behind"))
    return verdict


def _judge_built(verdict: Verdict, hostile: Hostile) -> None:
    verdict.ended = "built"
    if hostile.refuse:
        verdict.faults.append(Fault("silently wrong", "it is built, which must be refused"))
        return
    outcome = run_cli("-q", "verify", hostile.output)
    verdict.faults += judge_outcome(outcome)
    if outcome.status != 0:
        said = (outcome.stdout + outcome.stderr)[-300:]
        verdict.faults.append(Fault("silently wrong", f"it is built, but not verified: {said}"))


def _special_file(hostile: Hostile, rng: Rng) -> str:
    paths = sorted(
        path for path in hostile.directory.iterdir() if path.suffix in (".json", ".safetensors")
    )
    path = paths[rng.integers(len(paths))]
    path.unlink()
    return f"{path.name} is a {make_special(path, rng)}"


def _folder_or_link(hostile: Hostile, rng: Rng) -> str:
    paths = sorted(
        path for path in hostile.directory.iterdir() if path.suffix in (".json", ".safetensors")
    )
    path = paths[rng.integers(len(paths))]
    path.unlink()
    target = ["", path.name, "nowhere", "/dev/zero", "/"][rng.integers(5)]
    if target:
        path.symlink_to(target)
    else:
        path.mkdir()
    return f"{path.name} is {'a link to ' + target if target else 'a folder'}"


def _names(hostile: Hostile, rng: Rng) -> str:
    """Names that are no UTF-8, or hold control characters; the checkpoint is sound."""
    name = os.fsdecode(
        [b"x\xff", b"a\nb", b"\x1b[31mred", "é\u202e".encode(), b"-rf"][rng.integers(5)]
    )
    what = ("checkpoint", "output", "file beside")[rng.integers(3)]
    hostile.refuse, hostile.late = False, True
    if what == "checkpoint":
        moved = hostile.directory.with_name(name)
        hostile.directory.rename(moved)
        hostile.directory = moved
    elif what == "output":
        hostile.output = str(Path(hostile.output).with_name(name))
    else:
        (hostile.directory / name).write_bytes(b"")
    return f"name of the {what}: {name!a}"


def _tokenizer(hostile: Hostile, rng: Rng) -> str:
    hostile.refuse = False
    return spoil_tokenizer(hostile.directory / "tokenizer.json", rng)


ATTACKS: tuple[Callable[[Hostile, Rng], str], ...] = (
    hostile_configs.config_field,
    hostile_weights.tensors,
    _tokenizer,
    hostile_weights.header,
    hostile_configs.any_config_field,
    _special_file,
    _names,
    hostile_configs.config_field,
    hostile_configs.rope_field,
    hostile_configs.config_text,
    hostile_weights.tensors,
    _tokenizer,
    hostile_weights.index,
    _folder_or_link,
    hostile_configs.generation_config,
)
