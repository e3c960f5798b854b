"""Makes demo_statistics.npz: what the demo checkpoint's exits say on the text that ships, thinned.

python -m tests.promises.demo_statistics    # builds the demo's bundle, about two minutes
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ojfa_export.bundle.names import STATISTICS
from ojfa_export.cli.console import Console
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.compiler.pipeline import build
from ojfa_export.promises.statistics import ExitStatistics, load_statistics, save_statistics

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_suffix(".npz")
RANK = 96
EXITS = (3, 4, 5, 8, 11)
EVERY = 4  # sampled token


def thinned(statistics: ExitStatistics) -> ExitStatistics:
    columns = [statistics.exits.index(depth) for depth in EXITS]
    return ExitStatistics(
        statistics.blocks,
        EXITS,
        statistics.domains,
        statistics.domain,
        statistics.confidence[:, :, ::EVERY][..., columns],
        statistics.agrees[:, ::EVERY][..., columns],
        statistics.extra_surprisal[:, ::EVERY][..., columns],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--statistics", type=Path, help="of a bundle that is there already")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.statistics
        if path is None:
            options = BuildOptions(
                str(ROOT / "calibration" / "demo" / "checkpoint"),
                Path(scratch) / "demo.ojfa",
                rank=RANK,
                max_disagreement=0.1,  # any: the statistics don't depend on it
                skip_verification=True,
            )
            path = build(options, Console().progress()).bundle / STATISTICS
        splits = {name: thinned(each) for name, each in load_statistics(path).items()}
    save_statistics(arguments.output, splits)


if __name__ == "__main__":
    main()
