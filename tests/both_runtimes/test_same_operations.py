"""The Python runtime and the C++ runtime do the same, whatever is asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
from both_runtimes.compare import InCpp, difference, is_near_tie
from both_runtimes.in_python import InPython
from both_runtimes.operations import Operation, Sessions, programs
from both_runtimes.settings import SEED, examples, needs_programs, program
from vectors.cases import BUNDLES, DIRECTORY, open_bundle

from ojfa_export.runtime.model import Model

pytestmark = needs_programs

EXAMPLES = 50
# The most sessions that a near tie may end early; one with a true difference is none.
NEAR_TIES = 0.05


@dataclass
class Done:
    """What was compared."""

    sessions: int = 0
    operations: int = 0
    refused: int = 0
    tokens: int = 0
    near_ties: int = 0


class Both:
    """A stored bundle opened in both runtimes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: Model = open_bundle(name)
        self.cpp = InCpp([program("replay_operations"), DIRECTORY / f"{name}.ojfa"])
        self.done = Done()

    def compare(self, sessions: Sessions) -> None:
        """Does the operations of sessions in both."""
        before: list[Operation] = []
        for session in sessions:
            self._compare(session, before)
            before += session

    def _compare(self, session: list[Operation], before: list[Operation]) -> None:
        python, answers = InPython(self.model), []
        self.done.sessions += 1
        for count, asked in enumerate(session, 1):
            answers.append(self.cpp.answer_to(asked))
            mine = python.answer_to(asked)
            if found := difference(mine, answers[-1]):
                if is_near_tie(self.model, session[:count], answers):
                    self.done.near_ties += 1
                    return
                lines = "\n".join(map(json.dumps, [*before, *session[:count]]))
                raise AssertionError(f"{self.name}.ojfa, {found}, after\n{lines}")
            self.done.operations += 1
            self.done.refused += "error" in mine
            self.done.tokens += len(mine.get("steps", ()))


@pytest.fixture(params=BUNDLES)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    opened = Both(request.param)
    yield opened
    opened.cpp.close()


def test_random_operations(both: Both) -> None:
    @hypothesis.seed(SEED + BUNDLES.index(both.name))
    @examples(EXAMPLES)
    @hypothesis.given(programs)
    def compare(sessions: Sessions) -> None:
        both.compare(sessions)

    compare()
    print(both.name, both.done)
    assert both.done.near_ties <= NEAR_TIES * both.done.sessions
