"""Whether two runtimes gave the same, and what differs first."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from both_runtimes.in_python import Answer, InPython
from both_runtimes.operations import Operation
from noisy import Noisy
from tolerances import CONFIDENCE_OF_VECTORS, LOGITS_FP32, NOISE_RELATIVE

from ojfa_export.runtime.model import Model

# Of how many runs with noise one must give what the other runtime gave, for a near tie.
NOISY_RUNS = 32


class InCpp:
    """A program that does a line's operation in the C++ runtime and answers with a line.

    Args:
        command: The program and its arguments.
    """

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._command = command
        self._start()

    def _start(self) -> None:
        # Sanitizers write much: to a file, so that no pipe is ever full.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        pipe = subprocess.PIPE
        self._program = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=self._said, text=True
        )

    def answer_to(self, asked: Operation) -> Answer:
        """What the program answers.

        Raises:
            AssertionError: It ended; it is started again for the next.
        """
        stdin, stdout = self._program.stdin, self._program.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        line = stdout.readline()
        if not line:
            self.close()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
            self._start()
            raise AssertionError(f"the C++ program ended at {json.dumps(asked)}:\n{said[:4000]}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the program."""
        self._program.communicate()


def difference(python: Answer, cpp: Answer) -> str | None:
    """The first thing that one of them has and the other has not, in words; None where they agree.

    Logits, confidences and sums of them may differ by their tolerances, all else not.
    """
    if "error" in python or "error" in cpp:
        errors = python.get("error"), cpp.get("error")
        if errors[0] != errors[1]:
            told = python.get("message"), cpp.get("message")
            return f"errors: {errors[0]} ({told[0]}) in Python, {errors[1]} ({told[1]}) in C++"
    for name in python.keys() - {"state", "message"}:
        if found := _differ(name, python[name], cpp[name]):
            return found
    if "likeliest" in cpp:
        rows = cpp["logits"]
        own = [int(np.argmax(row)) if any(row) else -1 for row in rows]
        if own != cpp["likeliest"]:
            return f"likeliest: C++ says {cpp['likeliest']}, and its logits {own}"
    mine, theirs = python.get("state", {}), cpp.get("state", {})
    for name in mine:
        tolerance = CONFIDENCE_OF_VECTORS * (1 + sum(mine.get("stopped", ())))
        if found := _differ(name, mine[name], theirs[name], tolerance):
            return found
    return None


def _differ(
    name: str, mine: Any, theirs: Any, confidence: float = CONFIDENCE_OF_VECTORS
) -> str | None:
    tolerances = {"logits": LOGITS_FP32, "confidence": confidence, "confidence_sums": confidence}
    if name not in tolerances:
        same = mine == theirs
        return None if same else f"{name}: {mine} in Python, {theirs} in C++"
    both = [np.array(x, np.float64).reshape(-1) for x in (mine, theirs)]  # None becomes NaN
    if both[0].shape != both[1].shape:
        return f"{name}: {both[0].size} numbers in Python, {both[1].size} in C++"
    if np.allclose(*both, rtol=0, atol=tolerances[name], equal_nan=True):
        return None
    worst = int(np.nanargmax(np.abs(both[0] - both[1])))
    return f"{name}: number {worst} is {both[0][worst]} in Python, {both[1][worst]} in C++"


def is_near_tie(model: Model, operations: Sequence[Operation], cpp: Sequence[Answer]) -> bool:
    """Whether noise in its logits makes the Python runtime give what the C++ runtime gave.

    Noise no larger than what the logits of the two may differ by: where it explains an answer
    that differs, the last of these, two choices were as good as equally likely.
    """
    engines = model.engines
    try:
        for seed in range(NOISY_RUNS):
            model.engines = Noisy(engines, seed, NOISE_RELATIVE)
            noisy = InPython(model)
            answers = zip(operations, cpp, strict=True)
            if not any(difference(noisy.answer_to(asked), theirs) for asked, theirs in answers):
                return True
    finally:
        model.engines = engines
    return False
