"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
from pathlib import Path
from ojfa_export.system.heap import trim_heap

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

pieces = [bytearray(b"1") * 65536 for _ in range(3200)]  # below what is mapped by itself
last = bytearray(65536)  # at the heap's end, which then can't shrink by itself
del pieces
held = resident()
trim_heap()
print(held - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_freed_pieces_are_no_longer_resident():
    result = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True)
    assert int(result.stdout) > 150e6  # of 210 MB
