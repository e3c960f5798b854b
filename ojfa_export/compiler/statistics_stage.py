"""The stages that look at exits: every one on the tuning text, and those worth it on the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Engines
from ojfa_export.bundle.names import STATISTICS
from ojfa_export.compiler.decided import WHOLE_BYTES, is_timed_whole
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.self_text import read_self_text
from ojfa_export.compiler.stages import open_engines
from ojfa_export.compiler.work import Work
from ojfa_export.planning.frontier import DISAGREEMENTS
from ojfa_export.planning.step_costs import StepCosts, measure_costs
from ojfa_export.promises.choose import exits_to_certify
from ojfa_export.promises.collect import RUN, collect_statistics
from ojfa_export.promises.statistics import (
    SPLITS,
    ExitStatistics,
    join,
    load_statistics,
    save_statistics,
)
from ojfa_export.promises.windows import PromiseWindows
from ojfa_export.system.heap import release_memory, trim_heap
from ojfa_export.system.progress import Progress

# Of the tokens that are looked at: the same in every build, and others for certification.
SAMPLING_SEED, CERTIFYING_SEED = 0, 1
# Turns of timing, and when to stop beginning them.
ROUNDS, SECONDS = 6, 10.0
# Of a larger model's blocks that are timed: many times what caches hold, a few blocks of memory.
TIMED_BYTES = 250_000_000
TUNING, CERTIFICATION = SPLITS


def collect(inputs: Inputs, work: Work, progress: Progress) -> None:
    """Notes what every exit says on the tuning text, for a promise to choose from.

    Where nothing is to be promised there is little text, and that is all that is needed: every exit
    is then looked at on both splits, and statistics.npz is written.
    """
    if inputs.options.limits is None:
        splits = _look(inputs, work, SPLITS, SAMPLING_SEED, progress)
        save_statistics(work.bundle / STATISTICS, splits)
    else:
        tuning = _look(inputs, work, (TUNING,), SAMPLING_SEED, progress)[TUNING]
        nothing = tuning.at(()).select(np.arange(0))
        save_statistics(_tuned(work), {TUNING: tuning, CERTIFICATION: nothing})
    trim_heap()


def collect_certified(inputs: Inputs, work: Work, progress: Progress) -> None:
    """Times steps, and looks at the exits that are worth it on the text to certify on.

    Which are worth it the tuning text and the times say, and nothing else. Where none are,
    no more text is run. Writes statistics.npz.
    """
    limits = inputs.options.limits
    assert limits is not None
    costs = _time_alone(inputs, work, progress)
    (work.scratch / "costs.json").write_text(costs.model_dump_json(), encoding="utf-8")
    splits = load_statistics(_tuned(work))
    windows = min(len(each) for found in _windows(inputs, work) for each in found.certification)
    exits = exits_to_certify(splits[TUNING], limits, DISAGREEMENTS, costs.of_policies(), windows)
    if exits:
        splits |= _look(inputs, work, (CERTIFICATION,), CERTIFYING_SEED, progress, exits)
    save_statistics(work.bundle / STATISTICS, splits)
    trim_heap()


def kept_costs(work: Work) -> StepCosts:
    """What steps cost when the exits to certify were chosen."""
    return StepCosts.model_validate_json((work.scratch / "costs.json").read_text(encoding="utf-8"))


def time_steps(inputs: Inputs, engines: Engines, progress: Progress) -> StepCosts:
    """Times steps of every kind on this machine; of a large model only its first blocks."""
    spec = inputs.checkpoint.spec
    return measure_costs(
        spec,
        engines,
        inputs.settings.max_cache_length,
        rounds=ROUNDS,
        seconds=SECONDS,
        progress=progress,
        most_bytes=WHOLE_BYTES if is_timed_whole(spec) else TIMED_BYTES,
    )


def _time_alone(inputs: Inputs, work: Work, progress: Progress) -> StepCosts:
    """`time_steps`, leaving no engines in memory."""
    costs = time_steps(inputs, open_engines(inputs, work), progress)
    release_memory()
    return costs


def _look(
    inputs: Inputs,
    work: Work,
    names: Sequence[str],
    seed: int,
    progress: Progress,
    exits: Sequence[int] | None = None,
) -> dict[str, ExitStatistics]:
    """What exits, by default every one, say on splits' windows: of the files, and self-text."""
    found = _windows(inputs, work)
    most = min(each.sampled for each in found)
    if len(found) > 1:  # as many of each window, whatever its length
        most = min(most, *(each.counted // RUN * RUN for each in found))
    parts: list[dict[str, ExitStatistics]] = []
    for windows in found:
        pieces = list(zip(*(windows.of(name) for name in names), strict=True))
        statistics = collect_statistics(
            inputs.checkpoint.spec,
            lambda: open_engines(inputs, work),
            windows.domains,
            [np.concatenate(each) for each in pieces],
            work.scratch,
            progress,
            np.random.default_rng(seed),
            only=exits,
            given=windows.given,
            most=most,
        )
        of = np.concatenate([np.repeat(np.arange(len(names)), list(map(len, p))) for p in pieces])
        parts.append(
            {name: statistics.select(np.flatnonzero(of == i)) for i, name in enumerate(names)}
        )
    return {name: join([each[name] for each in parts]) for name in names}


def _windows(inputs: Inputs, work: Work) -> list[PromiseWindows]:
    """Of the files and of what the model wrote, whichever there are."""
    found = [] if inputs.statistics_windows is None else [inputs.statistics_windows]
    if inputs.self_text is not None:
        found.append(read_self_text(inputs.self_text, work))
    return found


def _tuned(work: Work) -> Path:
    """Statistics of the tuning split, with none of certification's."""
    return work.scratch / "tuning.npz"
