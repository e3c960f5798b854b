"""Writes a calibration report as JSON, pictures and one HTML page."""

from __future__ import annotations

from pathlib import Path

from ojfa_export.compiler.report.model import CalibrationReport
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.page import render


def write_report(report: CalibrationReport, directory: Path) -> list[Path]:
    """Writes report.json, report.html and the pictures into an existing folder.

    The page holds its pictures and refers to nothing outside itself. The same report gives the
    same bytes with the same matplotlib release. Needs the `build` extra.

    Returns:
        The files written; each appears whole or not at all.

    Raises:
        OSError: The folder is missing, full or not writable.
    """
    from ojfa_export.compiler.report import figures

    pictures = {
        "precision_by_exit": figures.precision_by_exit(report),
        "surprisal_by_exit": figures.surprisal_by_exit(report),
    }
    if report.precision_at_1:
        pictures["precision_matrix"] = figures.precision_matrix(report)
    contents = {f"{name}.png": picture for name, picture in pictures.items()}
    contents["report.html"] = render("ojfa_export.compiler.report", report, pictures).encode()
    contents["report.json"] = (report.model_dump_json(indent=2) + "\n").encode()
    paths = [directory / name for name in contents]
    for path, data in zip(paths, contents.values(), strict=True):
        write_atomically(path, data)
    return paths
