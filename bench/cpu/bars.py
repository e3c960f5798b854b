"""The bars that decoding must reach, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BIG_SHAPES = ("gpt2-small", "llama-1b-block")
MONOLITHIC_LIMIT = 1.05
TRANSFORMERS_LIMITS = {"demo": 3.0}
GENAI_LIMITS = {"demo": 1.3, "llama-1b-block": 1.1}
GENAI_DEPTH = 0.75
LINEARITY_LIMIT = 0.05
HALF_DEPTH_LIMIT = 0.55
OVERHEAD_TOKEN_US = 50.0
OVERHEAD_BLOCK_US = 15.0


@dataclass(frozen=True)
class Bar:
    """One requirement and what was measured.

    Attributes:
        past: Tokens in the cache; None where that plays no part.
        at_most: Whether the limit is an upper one.
    """

    what: str
    shape: str
    past: int | None
    value: float
    limit: float
    at_most: bool = True

    @property
    def verdict(self) -> Literal["pass", "falls short"]:
        """Whether the bar is reached."""
        reached = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "pass" if reached else "falls short"

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return {
            "what": self.what,
            "shape": self.shape,
            "past": self.past,
            "value": self.value,
            "limit": self.limit,
            "comparison": "<=" if self.at_most else ">=",
            "verdict": self.verdict,
        }


def bars(result: Mapping[str, Any]) -> list[Bar]:
    """Every bar that one shape's result has a say on.

    Args:
        result: What `bench.cpu.one_shape` wrote.
    """
    shape = str(result["shape"])
    found: list[Bar] = []
    for past, contestants in result["past"].items():
        medians = {str(each["name"]): float(each["ms_median"]) for each in contestants}
        exits = {
            int(each["blocks"]): float(each["ms_median"])
            for each in contestants
            if each["name"].startswith("chain-")
        }
        found += _against_peers(shape, int(past), medians, exits)
        found += _across_exits(shape, int(past), exits)
    overhead = result["overhead"]
    for unit, limit in (("token", OVERHEAD_TOKEN_US), ("block", OVERHEAD_BLOCK_US)):
        value = float(overhead[f"per_{unit}_us"])
        found.append(Bar(f"step overhead per {unit}, us", shape, None, value, limit))
    return found


def _against_peers(
    shape: str, past: int, medians: Mapping[str, float], exits: Mapping[int, float]
) -> Iterator[Bar]:
    blocks = max(exits)
    chain = exits[blocks]
    if shape in BIG_SHAPES:
        value = chain / medians["monolithic"]
        yield Bar("chain / monolithic", shape, past, value, MONOLITHIC_LIMIT)
    limit = TRANSFORMERS_LIMITS.get(shape, 1.0)
    value = medians["transformers"] / chain
    yield Bar("transformers / chain", shape, past, value, limit, at_most=False)
    if "onnxruntime-genai" not in medians:
        return
    genai = medians["onnxruntime-genai"]
    yield Bar("chain / genai", shape, past, chain / genai, GENAI_LIMITS.get(shape, 1.0))
    early = [exit for exit in exits if exit <= GENAI_DEPTH * blocks]
    if early:
        slowest = max(exits[exit] for exit in early)
        yield Bar("slowest exit up to 3/4 / genai", shape, past, slowest / genai, 1.0)


def _across_exits(shape: str, past: int, exits: Mapping[int, float]) -> Iterator[Bar]:
    blocks = max(exits)
    early = sorted(set(exits) - {blocks})
    # A line through two points says nothing.
    if len(early) > 2:
        value = nonlinearity({exit: exits[exit] for exit in early})
        what = "largest deviation of an exit from N blocks + head"
        yield Bar(what, shape, past, value, LINEARITY_LIMIT)
    if blocks // 2 in exits:
        value = exits[blocks // 2] / exits[blocks]
        yield Bar("half depth / full depth", shape, past, value, HALF_DEPTH_LIMIT)


def nonlinearity(times: Mapping[int, float]) -> float:
    """Largest relative deviation of a time from N blocks + head.

    The time of a block and of the head (with the embedding and the step itself) are those of the
    least-squares line in relative deviations.

    Args:
        times: By exit; exits with the exit head only, as the model's own head costs more.
    """
    depths, values = np.array(list(times)), np.array(list(times.values()))
    block, head = np.polyfit(depths, values, 1, w=1 / values)
    return float((np.abs(block * depths + head - values) / values).max())
