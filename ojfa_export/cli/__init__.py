"""The command line. Importing it costs click and nothing more; commands import what they need."""

from __future__ import annotations

from ojfa_export.cli.app import main

__all__ = ["main"]
