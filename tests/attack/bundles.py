"""A bundle in both runtimes: what each says of it, compared with the undamaged one."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .child import Outcome, run_cli, run_forked, run_program
from .judge import Fault, Must, judge_outcome, lacks_memory, refused

Rng = np.random.Generator

VECTORS = Path(__file__).parents[2] / "engines" / "tests" / "vectors"
SUBJECTS = ("llama", "gpt2", "phi3")
# LongRoPE's long factors begin at 32 tokens: the last prompt crosses it.
PROMPTS = ("def f(x):", "import os\n", "usage: %(prog)s [options] where each word is a token")
EXITS: tuple[int | str, ...] = ("full", 1, 2, "auto")
NEW_TOKENS = 8
NO_MEMORY = "C++'s reference backend allocates a cache at once, Python maps it as it is written"
DESCRIBED_ONLY = "ports and axes that a manifest describes are compared by Python alone"
READ_WHOLE = "C++'s reference backend reads every weight, Python those that tokens touch"
GOLDEN_AT_LOAD = "C++ compares golden tokens when it loads a bundle, Python in verify"


@dataclass
class Case:
    """A damaged copy of a bundle.

    Attributes:
        subject: Which of SUBJECTS it was.
        bundle: The copy.
        what: The damage, in words.
        must: What must notice it.
        another: Whether the damage only makes another model or policy: other tokens are right.
        one_runtime: Why only one of the runtimes can see the damage; empty where both must.
    """

    subject: str
    bundle: Path
    what: str
    must: Must = Must.ANY
    another: bool = False
    one_runtime: str = ""


@dataclass
class Verdict:
    """What was found of a case.

    Attributes:
        ended: How, in a word or two.
        allowed: Why the runtimes differ, where they do and may.
    """

    what: str
    ended: str = ""
    allowed: str = ""
    faults: list[Fault] = field(default_factory=list)


def copy_subject(name: str, directory: Path) -> Path:
    """A fresh copy of a bundle in a directory."""
    bundle = directory / f"{name}.ojfa"
    shutil.copytree(VECTORS / bundle.name, bundle)
    return bundle


def judge_bundle(case: Case, rng: Rng, run: Path | None) -> Verdict:
    """Runs commands on a damaged bundle in both runtimes and judges what they say.

    Args:
        case: The damage done.
        rng: Chooses commands where not all are run.
        run: The C++ runtime's `ojfa-run`, or None.
    """
    # First, since a build in the bundle changes it.
    given, cpp = _tokens_cpp(case.bundle, case.subject, run) if run else (None, None)
    outcomes, ended = _ask_python(case, rng)
    verdict = Verdict(case.what, ended)
    if run is not None and given is not None:
        outcomes.append(given)
        if (difference := _difference(case, ended, cpp, run)) is not None:
            verdict.allowed = NO_MEMORY if lacks_memory(given) else _allowed(case, ended, cpp)
            if not verdict.allowed:
                verdict.faults.append(Fault("differences", f"{difference}; {_said(given)}"))
        if case.must is Must.REFUSE and cpp is not None:
            verdict.faults.append(Fault("silently wrong", "C++ runs it, which must refuse it"))
    for outcome in outcomes:
        verdict.faults += judge_outcome(outcome)
    if ended in ("unnoticed", "not refused"):
        verdict.faults.append(Fault("silently wrong", f"{ended}: {case.must.value}"))
    return verdict


def _ask_python(case: Case, rng: Rng) -> tuple[list[Outcome], str]:
    """What the Python runtime's commands said, and in one word how it ended."""
    bundle = str(case.bundle)
    opened, tokens = _tokens_python(case.bundle)
    more: list[Callable[[], Outcome]] = [
        lambda: run_cli("-q", "run", bundle, "-p", PROMPTS[0], "--max-new-tokens", "4"),
        lambda: run_cli("-q", "inspect", bundle, *(["--json"] if rng.random() < 0.5 else [])),
        lambda: run_cli("-q", "build", bundle, "--backend", "onnxruntime"),
    ]
    verify = functools.partial(run_cli, "-q", "verify", bundle)
    if tokens is None:  # every other command must refuse it, too: one of them is asked
        other = [verify, *more][rng.integers(1 + len(more))]()
        if opened.status is not None and not refused(other) and case.must is Must.REFUSE:
            return [opened, other], "not refused"
        return [opened, other], "refused"
    verified = verify()
    named = verified.status != 0
    if case.must is Must.REFUSE:
        ended = "not refused"
    elif case.must is Must.NAME and not named:
        ended = "unnoticed"
    elif named:
        ended = "altered, named by verify"
    elif _same(tokens, reference_tokens(case.subject)):
        ended = "harmless"
    else:
        ended = "another model" if case.another else "unnoticed"
    return [opened, verified, more[rng.integers(len(more))]()], ended


def _difference(case: Case, ended: str, cpp: dict[str, Any] | None, run: Path) -> str | None:
    """How the runtimes' verdicts differ."""
    if ended == "refused":
        return None if cpp is None else "Python refuses it, C++ runs it"
    if cpp is None:
        sound = ended in ("harmless", "another model")
        return f"Python runs{' and verifies' if sound else ''} it, C++ refuses it"
    if ended == "harmless" and not _same(cpp, reference_cpp(case.subject, run)):
        return "C++ gives other tokens, Python the undamaged bundle's"
    return None


def _allowed(case: Case, ended: str, cpp: dict[str, Any] | None) -> str:
    """Why the runtimes may differ here; empty where they mustn't."""
    if cpp is None and ended == "altered, named by verify":
        return GOLDEN_AT_LOAD
    return case.one_runtime


def _same(tokens: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether every exit that gave tokens gave those expected; some may have been refused."""
    return all(found is None or found == expected[exit] for exit, found in tokens.items())


@functools.cache
def reference_tokens(subject: str) -> dict[str, Any]:
    """The undamaged bundle's tokens by exit, by the Python runtime."""
    outcome, tokens = _tokens_python(VECTORS / f"{subject}.ojfa")
    assert tokens is not None, outcome
    return tokens


@functools.cache
def reference_cpp(subject: str, run: Path) -> dict[str, Any]:
    """The undamaged bundle's tokens by exit, by the C++ runtime."""
    outcome, tokens = _tokens_cpp(VECTORS / f"{subject}.ojfa", subject, run)
    assert tokens is not None, outcome
    return tokens


@functools.cache
def prompt_ids(subject: str) -> list[list[int]]:
    """The prompts as the undamaged tokenizer has them: `ojfa-run` takes ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(VECTORS / f"{subject}.ojfa" / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def _tokens_python(bundle: Path) -> tuple[Outcome, dict[str, Any] | None]:
    """Loads a bundle and generates at every exit.

    Returns:
        How that ended; the token ids by exit, None for an exit that is refused; or None where
        loading is refused, or all exits.
    """

    def body() -> None:
        import ojfa_export
        from ojfa_export.cli.console import Console
        from ojfa_export.cli.errors import report
        from ojfa_export.errors import OjfaError

        found: dict[str, Any] = {}
        refusal: Exception | None = None
        try:
            model = ojfa_export.load(bundle)
            for exit in EXITS:
                try:
                    made = model.generate(PROMPTS, exit=exit, max_new_tokens=NEW_TOKENS)  # type: ignore[arg-type]
                    found[str(exit)] = [list(each.token_ids) for each in made.prompts]
                except OjfaError as error:
                    found[str(exit)], refusal = None, error
            if all(tokens is None for tokens in found.values()) and refusal is not None:
                raise refusal
        except Exception as error:
            raise SystemExit(report(error, Console())) from error
        print(json.dumps(found))

    outcome = run_forked(f"load {str(bundle)!r} and generate", body)
    return outcome, json.loads(outcome.stdout) if outcome.status == 0 else None


def _tokens_cpp(bundle: Path, subject: str, run: Path) -> tuple[Outcome, dict[str, Any] | None]:
    """The same by `ojfa-run` and its reference backend; the outcome is the last exit's."""
    found: dict[str, Any] = {}
    ids = [word for each in prompt_ids(subject) for word in ("--ids", ",".join(map(str, each)))]
    last = None
    for exit in EXITS:
        arguments = [str(run), str(bundle), "--backend", "reference", *ids]
        arguments += ["--exit", str(exit), "--max-new-tokens", str(NEW_TOKENS)]
        outcome = run_program(arguments)
        if outcome.status == 0:
            rows = json.loads(outcome.stdout)["prompts"]
            found[str(exit)] = [row["token_ids"] for row in rows]
        else:
            found[str(exit)], last = None, outcome
            if exit == EXITS[0]:  # at full depth: it is the bundle that is refused
                return outcome, None
    return last or outcome, found


def _said(outcome: Outcome) -> str:
    return " / ".join(outcome.stderr.splitlines()[:1]) or f"C++ ended with {outcome.status}"
