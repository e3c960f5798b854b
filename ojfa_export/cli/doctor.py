"""`ojfa-export doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.cli.readable import readable_bytes
from ojfa_export.errors import ExitStatus

if TYPE_CHECKING:
    from ojfa_export.backends.doctor import Diagnosis, Package


@define("doctor")
def command(console: Console) -> int:
    """Show what works on this machine.

    And what to do about what does not. Exit status 1 means that the default backend does not work.
    """
    from ojfa_export.backends.doctor import diagnose

    found = diagnose()
    works = found.backends[0].works
    if console.json:
        console.emit({"works": works, **asdict(found)})
    else:
        show(console, found)
    return ExitStatus.OK if works else ExitStatus.FAILURE


def show(console: Console, found: Diagnosis) -> None:
    """Writes a diagnosis for people, by click alone: any other package may be missing."""
    machine = found.machine
    memory = "unknown"
    if machine.memory_bytes is not None and machine.available_bytes is not None:
        memory = (
            f"{readable_bytes(machine.memory_bytes)}, "
            f"{readable_bytes(machine.available_bytes)} available"
        )
    for name, value in (
        ("Python", machine.python),
        ("platform", machine.platform),
        ("CPU", f"{machine.cpu}, {machine.cores} cores available"),
        ("CPU features", ", ".join(machine.features) or "none of those that matter"),
        ("memory", memory),
        ("GPUs", "; ".join(machine.gpus) or "none seen"),
        ("OJFA_THREADS", found.threads or "not set: every core available"),
    ):
        console.print(f"{name:<14}{value}")
    console.print("\nPackages")
    for package in found.packages:
        console.print(f"  {package.name:<17} {_describe_package(package)}")
    console.print("\nBackends")
    for backend in found.backends:
        console.print(f"  {backend.name:<17} {'works' if backend.works else '-'}: {backend.detail}")
        if backend.hint:
            console.print(f"  {'':<17} hint: {backend.hint}")


def _describe_package(package: Package) -> str:
    state = package.version or "not installed"
    if package.version and package.hint:
        state += f", too old: {package.minimum} or later"
    text = f"{state:<16} needed to {package.needed_for}"
    return f"{text}; {package.hint}" if package.hint else text
