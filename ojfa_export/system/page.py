"""Fills a page's template."""

from __future__ import annotations

import base64
from collections.abc import Mapping

from pydantic import BaseModel


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
