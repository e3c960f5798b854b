"""A bundle in both runtimes, and what is compared of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from both_runtimes.compare import InCpp, difference, is_near_tie
from both_runtimes.in_python import InPython
from both_runtimes.operations import Operation, Sessions
from both_runtimes.settings import program

import ojfa_export
from ojfa_export.runtime.model import Model


@dataclass
class Done:
    """What was compared."""

    sessions: int = 0
    operations: int = 0
    refused: int = 0
    tokens: int = 0
    near_ties: int = 0


class Both:
    """A bundle opened in both runtimes."""

    def __init__(self, bundle: Path) -> None:
        self.name = bundle.stem
        self.model: Model = ojfa_export.load(bundle)
        self.cpp = InCpp([program("replay_operations"), bundle])
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
