"""The main job on the demo checkpoint: build, verify, generate, and what each exit costs and gives.

python -m calibration.demo.show --checkpoint calibration/demo/checkpoint --bundle demo.ojfa
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPT = "def parse("
NEW_TOKENS = "48"
# The paper's floor(H/100) is 1 at this hidden size of 192: too narrow for any use.
RANK = "96"


def main() -> int:
    """Runs the demo; each step is the command that a user would type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint, bundle = str(arguments.checkpoint), str(arguments.bundle)

    step("build", checkpoint, "-o", bundle, "--rank", RANK, "--overwrite")
    step("verify", bundle, "--quiet")
    report = json.loads((arguments.bundle / "report" / "report.json").read_text(encoding="utf-8"))
    blocks = report["blocks"]
    for depth in ("full", str(blocks * 3 // 4)):
        step("run", bundle, "-p", PROMPT, "--exit", depth, "--max-new-tokens", NEW_TOKENS)
    measured = json.loads(capture("bench", bundle, "--json"))
    show_table(report, measured)
    print(f"\nreport with pictures: {arguments.bundle / 'report' / 'report.html'}")
    return 0


def step(*arguments: str) -> None:
    """Runs a command in sight of the user."""
    print(f"\n$ ojfa-export {' '.join(map(quoted, arguments))}", flush=True)
    if status := subprocess.run(command(*arguments), check=False).returncode:
        sys.exit(status)


def capture(*arguments: str) -> str:
    """Runs a command and returns what it prints."""
    print(f"\n$ ojfa-export {' '.join(map(quoted, arguments))}", flush=True)
    result = subprocess.run(command(*arguments), check=False, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)
    return result.stdout


def command(*arguments: str) -> list[str]:
    """The command line of this very environment."""
    return [sys.executable, "-m", "ojfa_export", *arguments]


def quoted(argument: str) -> str:
    """An argument as one would type it."""
    return f"'{argument}'" if any(c in " (" for c in argument) else argument


def show_table(report: dict[str, Any], measured: dict[str, Any]) -> None:
    """Prints exit, ms/token and agreement with the full model."""
    agreement = {row["blocks"]: row[report["kind"]]["precision_at_1"] for row in report["exits"]}
    agreement[report["blocks"]] = 1.0
    print("\n exit  ms/token  agreement with the full model")
    for row in measured["exits"]:
        share = agreement[row["blocks"]]
        name = "full" if row["blocks"] == report["blocks"] else row["blocks"]
        print(f"{name:>5}  {row['decode_ms_median']:8.3f}  {share:7.1%}  {'#' * round(40 * share)}")


if __name__ == "__main__":
    sys.exit(main())
