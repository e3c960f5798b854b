"""Ways of decoding one sequence that both the C++ and the Python runtime have."""

from __future__ import annotations

from dataclasses import dataclass, field

from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.model import Model

SAMPLED = Sampling(0.8, top_k=50, top_p=0.9, seed=7)


@dataclass(frozen=True)
class Way:
    """A way of decoding one sequence.

    Attributes:
        name: In results.
        exit: Blocks run, or the policy that decides; None for full depth.
        speculation: In place of an exit.
        sampling: How tokens are chosen.
    """

    name: str
    exit: int | ExitPolicy | None = None
    speculation: Speculation | None = None
    sampling: Sampling = field(default_factory=Sampling)


def ways(model: Model) -> list[Way]:
    """Every way of decoding that both runtimes have."""
    blocks = model.blocks
    quarter, half = max(1, blocks // 4), max(1, blocks // 2)
    some = tuple(sorted({quarter, half, max(1, 3 * blocks // 4)}))
    count = len(some)
    result = [
        Way("full"),
        *(Way(f"exit {exit}", exit) for exit in sorted({1, quarter, half, blocks - 1})),
        Way("top", ExitPolicy(exits=some, measure="top", thresholds=(0.5,) * count)),
        Way("margin", ExitPolicy(exits=some, measure="margin", thresholds=(0.2,) * count)),
        Way("entropy", ExitPolicy(exits=some, measure="entropy", thresholds=(-1.5,) * count)),
        Way("every exit", every_exit(blocks, 0.6)),
        Way("speculation", speculation=Speculation(half)),
        Way("drafts of 4", speculation=Speculation(half, 4)),
        Way("sampled", sampling=SAMPLED),
        Way(f"sampled, exit {half}", half, sampling=SAMPLED),
        Way("sampled, every exit", every_exit(blocks, 0.6), sampling=SAMPLED),
        Way("sampled speculation", speculation=Speculation(half), sampling=SAMPLED),
    ]
    if model.manifest.auto is not None:
        result.append(Way("auto", model.manifest.auto))
    return result


def every_exit(blocks: int, threshold: float, last: float | None = None) -> ExitPolicy:
    """A check after each block but the last one."""
    thresholds = [threshold] * (blocks - 1)
    if last is not None:
        thresholds[-1] = last
    return ExitPolicy(exits=tuple(range(1, blocks)), measure="top", thresholds=tuple(thresholds))
