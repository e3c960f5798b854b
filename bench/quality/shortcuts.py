"""Compares every kind of shortcut on a checkpoint at several ranks, and records the figures.

python -m bench.quality.shortcuts CHECKPOINT --rank 2 --rank 16 \
    --out bench/results/compare/NAME.json

Writes one JSON file with `ojfa-export compare`'s document for each rank, and for the last rank its
picture of quality by exit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench.commit import commit
from ojfa_export.compiler.compare import compare_shortcuts
from ojfa_export.compiler.options import BuildOptions
from ojfa_export.shortcuts.comparison.model import Comparison
from ojfa_export.system.progress import SILENT


def main() -> None:
    """Compares and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--rank", type=int, action="append", required=True)
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    before = commit()
    reports = []
    with tempfile.TemporaryDirectory() as temporary:
        for rank in arguments.rank:
            output = Path(temporary) / str(rank)
            options = BuildOptions(
                arguments.checkpoint,
                output,
                rank=rank,
                calibration_data=tuple(arguments.data),
                calibration_tokens=arguments.tokens,
            )
            report = compare_shortcuts(options, True, SILENT)
            reports.append(report)
            print(summary(report), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        picture = arguments.out.with_suffix(".png")
        shutil.copyfile(output / "quality_by_exit.png", picture)
    document = {"commit": before, "ranks": [report.model_dump(mode="json") for report in reports]}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def summary(report: Comparison) -> str:
    """One line for each kind, and one for each claim."""
    lines: list[Any] = [f"{report.model}, rank {report.rank}"]
    for each in report.kinds:
        exits = " ".join(f"{quality.precision_at_1:.3f}" for quality in each.exits)
        lines.append(f"{each.kind:22} {each.mean('precision_at_1'):.4f}  {exits}")
    for claim in report.claims:
        lines.append(f"{'yes' if claim.holds else 'NO ':3} {claim.statement} {claim.evidence}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
