"""Learn-then-Test (Angelopoulos et al., arXiv 2110.01052): fixed-sequence testing.

Candidates stand in an order that does not depend on the certification split. Each has the null
hypothesis "a risk is above its limit". They are tested in turn, each at level 1 - confidence, and
the first that can't be rejected ends it. The first true null of the order is rejected with
probability 1 - confidence at most, and no later one without it: so with the promised confidence
**every** candidate before the end keeps its limits, whatever their number. No further correction is
needed, and any of them may be used.

One candidate has several hypotheses, one for each domain and each limit, and keeps its promise
only if all are false. It counts as rejected when all of them are (an intersection-union test): the
largest p-value is a p-value of their union, since where one of them is true, its own p-value is
already small too rarely. This too needs no correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def union_p_value(p_values: Sequence[float]) -> float:
    """The p-value of "one of these hypotheses is true"."""
    return max(p_values)


def fixed_sequence(p_values: Iterable[float], confidence: float) -> int:
    """How many candidates, from the first on, are shown to keep their promise.

    Args:
        p_values: In the order of the candidates; not read beyond the first that fails.
        confidence: 0..1, exclusive.
    """
    certified = 0
    for p_value in p_values:
        if p_value > 1 - confidence:
            break
        certified += 1
    return certified
