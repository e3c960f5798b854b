"""`python -m tests.attack`: attacks the program, and exits 1 where it finds a fault."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

# Before anything is imported that starts threads: every command is a fork of this process.
os.environ.update(OJFA_THREADS="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from .bundles import Verdict
from .child import is_program, preload
from .judge import FAULTS, Fault
from .plan import COUNTS, Attack, prepare, run_case

SANITIZED = Path(__file__).parents[2] / "engines" / "build" / "asan" / "tools" / "ojfa-run"
Key = tuple[str, int]


def main() -> int:
    """Runs the attack; returns the exit status."""
    options = _options()
    run = options.ojfa_run if is_program(options.ojfa_run) else None
    if run is None:
        print(f"C++ is left out: no program at {options.ojfa_run} (engines/test.sh builds it)")
    cases = _cases(options.only, options.classes, options.share, options.seed)
    preload()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="attack-") as bases:
        attack = Attack(options.seed, Path(bases), run)
        prepare(attack, {name for name, _ in cases})
        found = {}
        for key, verdict in _run(attack, cases, options.jobs):
            found[key] = verdict
            _show(key, verdict, options.seed, options.only is not None)
            if len(found) % 50 == 0 or len(found) == len(cases):
                elapsed = time.perf_counter() - start
                print(f"{len(found)} of {len(cases)} cases, {elapsed:.0f} s", flush=True)
    _summarize(found)
    if options.json is not None:
        _write(options.json, options.seed, found)
    return int(any(verdict.faults for verdict in found.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--share", type=float, default=1.0, help="of each class's cases")
    parser.add_argument("--classes", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--only", metavar="CLASS:NUMBER", help="one case, every fault in full")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every case's verdict")
    default = Path(os.environ.get("OJFA_ATTACK_RUN", SANITIZED))
    parser.add_argument(
        "--ojfa-run", type=Path, default=default, help="the C++ runtime's, best with sanitizers"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}")
    return options


def _cases(only: str | None, classes: list[str], share: float, seed: int) -> list[Key]:
    if only is not None:
        name, _, number = only.partition(":")
        return [(name, int(number))]
    cases = []
    for name in classes:
        count = max(1, round(share * COUNTS[name]))
        chosen = np.random.default_rng(seed).choice(COUNTS[name], count, replace=False)
        cases += [(name, number) for number in sorted(chosen.tolist())]
    return cases


def _run(attack: Attack, cases: list[Key], jobs: int) -> Iterator[tuple[Key, Verdict]]:
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        futures = {pool.submit(_guarded, attack, *key): key for key in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _guarded(attack: Attack, name: str, number: int) -> Verdict:
    """A case; what goes wrong in the attack itself is a fault, too, and no end of it."""
    try:
        return run_case(attack, name, number)
    except Exception:
        last = traceback.format_exc().splitlines()[-3:]
        return Verdict("the attack itself failed", faults=[Fault("tracebacks", " / ".join(last))])


def _show(key: Key, verdict: Verdict, seed: int, whole: bool) -> None:
    name, number = key
    if whole:
        print(f"{name}:{number} {verdict.what!a}: {verdict.ended}")
    shown = set()
    for fault in verdict.faults:
        if whole:
            print(f"  {fault.kind}: {fault.what}")
        elif fault.kind not in shown:
            shown.add(fault.kind)
            print(f"--seed {seed} --only {name}:{number} {verdict.what[:120]!a}: ", end="")
            print(f"{fault.kind}: {_short(fault.what)!a}")


def _short(text: str) -> str:
    return text if len(text) < 260 else f"{text[:80]} … {text[-170:]}"


def _summarize(found: dict[Key, Verdict]) -> None:
    """Cases with each kind of fault, by class; then how the others ended."""
    columns = ("cases", *FAULTS)
    print(f"\n{'':12}" + "".join(f"{column:>16}" for column in columns))
    for name in (*COUNTS, "all"):
        verdicts = [verdict for key, verdict in found.items() if name in (key[0], "all")]
        if verdicts:
            kinds = Counter(kind for each in verdicts for kind in {f.kind for f in each.faults})
            numbers = [len(verdicts), *(kinds[kind] for kind in FAULTS)]
            print(f"{name:12}" + "".join(f"{number:16}" for number in numbers))
    ends = Counter(verdict.ended for verdict in found.values() if not verdict.faults)
    print("without fault: " + ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    reasons = Counter(verdict.allowed for verdict in found.values() if verdict.allowed)
    for reason, count in reasons.most_common():
        print(f"{count} differences between the runtimes that may be: {reason}")


def _write(path: Path, seed: int, found: dict[Key, Verdict]) -> None:
    cases = [
        {"class": name, "number": number, **asdict(verdict)}
        for (name, number), verdict in sorted(found.items())
    ]
    path.write_text(json.dumps({"seed": seed, "cases": cases}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
