"""What a benchmark on a GPU ran on."""

from __future__ import annotations

import shutil
import subprocess


def nvidia_smi() -> str:
    """Name, driver, clocks and power as nvidia-smi tells."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
