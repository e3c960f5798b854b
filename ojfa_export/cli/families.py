"""`ojfa-export families`."""

from __future__ import annotations

from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console


@define("families")
def command(console: Console) -> None:
    """List the model families that can be built.

    A checkpoint's family is the `model_type` of its config.json.
    """
    from ojfa_export.models.families import FAMILIES

    known = sorted(FAMILIES.items())
    if console.json:
        console.emit({name: family.models for name, family in known})
        return
    console.table(("model_type", "models"), [(name, family.models) for name, family in known])
