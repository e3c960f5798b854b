"""`python -m ojfa_export`."""

from __future__ import annotations

from ojfa_export.cli import main

main()
