"""The Python runtime and the C++ runtime do the same, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
from both_runtimes.both import Both
from both_runtimes.operations import Sessions, programs
from both_runtimes.settings import SEED, examples, needs_programs
from vectors.cases import BUNDLES, DIRECTORY

pytestmark = needs_programs

EXAMPLES = 40
# The most sessions that a near tie may end early; one with a true difference is none.
NEAR_TIES = 0.05


@pytest.fixture(params=BUNDLES)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    opened = Both(DIRECTORY / f"{request.param}.ojfa")
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
