"""The classes of the attack, and one case of one of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import checkpoints, damages, kills, lies, values
from .bundles import Case, Rng, Verdict, judge_bundle

Make = Callable[[int, Rng, Path], Case]
BUNDLE_CLASSES: dict[str, tuple[Make, int]] = {
    "damage": (damages.make, damages.COUNT),
    "lie": (lies.make, lies.COUNT),
    "value": (values.make, values.COUNT),
}
COUNTS = {
    "kill": kills.COUNT,
    "checkpoint": checkpoints.COUNT,
    **{name: count for name, (_, count) in BUNDLE_CLASSES.items()},
}


@dataclass(frozen=True)
class Attack:
    """What all cases share.

    Attributes:
        seed: Of all random choices.
        bases: Directory of sound checkpoints and what else was prepared.
        run: The C++ runtime's `ojfa-run`, or None.
    """

    seed: int
    bases: Path
    run: Path | None


def prepare(attack: Attack, classes: set[str]) -> None:
    """Makes what the cases of these classes start from."""
    if classes & {"kill", "checkpoint"}:
        checkpoints.make_bases(attack.bases)
    if "kill" in classes:
        kills.prepare(attack.bases)


def run_case(attack: Attack, name: str, number: int) -> Verdict:
    """Runs and judges one case; the same seed, class and number give the same one."""
    rng = np.random.default_rng([attack.seed, sorted(COUNTS).index(name), number])
    with tempfile.TemporaryDirectory(prefix=f"{name}-{number}-") as kept:
        directory = Path(kept)
        if name == "kill":
            return kills.attack(number, rng, directory, attack.bases)
        if name == "checkpoint":
            return checkpoints.attack(number, rng, directory, attack.bases)
        make, _ = BUNDLE_CLASSES[name]
        return judge_bundle(make(number, rng, directory), rng, attack.run)
