"""Writes a comparison as JSON, pictures and one HTML page."""

from __future__ import annotations

from pathlib import Path

from ojfa_export.shortcuts.comparison.model import Comparison
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.page import render

# The file by which a directory is known as a comparison.
NAMED = "comparison.json"


def write_comparison(report: Comparison, directory: Path) -> list[Path]:
    """Writes comparison.json, comparison.html and the pictures into an existing folder.

    The page holds its pictures and refers to nothing outside itself. Needs the `build` extra.

    Returns:
        The files written; each appears whole or not at all.

    Raises:
        OSError: The folder is missing, full or not writable.
    """
    from ojfa_export.shortcuts.comparison import figures
    from ojfa_export.shortcuts.matrix_picture import draw_matrix

    chosen = report.of("ojfa").fitted_at
    pictures = {
        "quality_by_exit": figures.quality_by_exit(report),
        "quality_by_cost": figures.quality_by_cost(report),
        "precision_matrix": draw_matrix(report.precision_at_1, chosen or 1),
    }
    contents = {f"{name}.png": picture for name, picture in pictures.items()}
    contents["comparison.html"] = render(
        "ojfa_export.shortcuts.comparison", report, pictures
    ).encode()
    contents[NAMED] = (report.model_dump_json(indent=1) + "\n").encode()
    paths = [directory / name for name in contents]
    for path, data in zip(paths, contents.values(), strict=True):
        write_atomically(path, data)
    return paths
