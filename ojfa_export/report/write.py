"""Writes a calibration report as JSON, pictures and one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from ojfa_export.atomic import write_atomically
from ojfa_export.report.model import CalibrationReport


def write_report(report: CalibrationReport, directory: Path) -> list[Path]:
    """Writes report.json, report.html and the pictures into an existing folder.

    The page holds its pictures and refers to nothing outside itself. The same report gives the
    same bytes with the same matplotlib release. Needs the `build` extra.

    Returns:
        The files written; each appears whole or not at all.

    Raises:
        OSError: The folder is missing, full or not writable.
    """
    from ojfa_export.report import figures

    pictures = {
        "precision_by_exit": figures.precision_by_exit(report),
        "surprisal_by_exit": figures.surprisal_by_exit(report),
        "precision_matrix": figures.precision_matrix(report),
    }
    contents = {f"{name}.png": picture for name, picture in pictures.items()}
    contents["report.html"] = render("ojfa_export.report", report, pictures).encode()
    contents["report.json"] = (report.model_dump_json(indent=2) + "\n").encode()
    paths = [directory / name for name in contents]
    for path, data in zip(paths, contents.values(), strict=True):
        write_atomically(path, data)
    return paths


def render(package: str, report: BaseModel, pictures: Mapping[str, bytes]) -> str:
    """Fills a package's template.html with a report and its pictures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sources = {
        name: "data:image/png;base64," + base64.b64encode(picture).decode()
        for name, picture in pictures.items()
    }
    return environment.get_template("template.html").render(report=report, pictures=sources)
