"""`ojfa-export monitor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ojfa_export import backends
from ojfa_export.cli.command import command as define
from ojfa_export.cli.console import Console
from ojfa_export.errors import ExitStatus

if TYPE_CHECKING:
    from ojfa_export.promises.drift.report import Comparison, DomainDrift, DriftReport


@define("monitor")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument(
    "logs",
    type=click.Path(path_type=Path),
    metavar="LOG|DOMAIN=LOG...",
    nargs=-1,
    required=True,
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", default=64, help="For each prompt."
)
@click.option(
    "--shadow-share",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="X",
    default=1.0,
    help="Of the tokens, to be compared with the full model.",
)
@click.option(
    "--false-alarms",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="X",
    default=0.01,
    help="Chance of an alarm while the promise is kept.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", default=0, help="Of the choice.")
@click.option(
    "--picture", type=click.Path(path_type=Path), metavar="FILE", help="Draw it into a PNG file."
)
@click.option("--backend", metavar="NAME", default=backends.DEFAULT, help="Engines to run.")
def command(
    console: Console,
    bundle: Path,
    logs: tuple[Path, ...],
    max_new_tokens: int,
    shadow_share: float,
    false_alarms: float,
    seed: int,
    picture: Path | None,
    backend: str,
) -> int:
    """Replay logged requests through BUNDLE beside its calibration.

    A LOG holds a prompt in each line, or JSON objects with "prompt" (to be gone on from) or "text"
    (to be read as it is) and, if known, "domain". Exit status 3 means an alarm: the promise on the
    tokens that differ from the full model was seen to be broken.
    """
    import ojfa_export
    from ojfa_export.promises.drift.figure import check_picture, draw
    from ojfa_export.promises.drift.log import read_logs
    from ojfa_export.promises.drift.replay import replay, watched
    from ojfa_export.promises.drift.report import make_report
    from ojfa_export.system.atomic import write_atomically

    if picture is not None:
        check_picture(picture)
    model = ojfa_export.load(bundle, backend=backend)
    known = watched(model)
    requests = read_logs(logs, known.statistics.domains)
    replayed = replay(
        model,
        requests,
        known.promise,
        console.progress(),
        share=shadow_share,
        false_alarms=false_alarms,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    report = make_report(str(bundle), known, replayed, shadow_share, false_alarms)
    if picture is not None:
        write_atomically(picture, draw(report))
    if console.json:
        console.emit(report.model_dump(mode="json") | {"alarm": report.alarm})
    else:
        for drift in report.domains:
            _show(console, drift)
        console.note(_summary(report))
    return ExitStatus.VERIFICATION if report.alarm else ExitStatus.OK


def _show(console: Console, drift: DomainDrift) -> None:
    name = "no domain named" if drift.domain is None else drift.domain
    windows = f"calibrated on {drift.calibration_windows} windows"
    console.heading(f"{name}: {drift.requests} requests, {drift.tokens:,} tokens; {windows}")
    exits = drift.exits
    depths = [f"exit {blocks}" for blocks in exits.blocks[:-1]] + ["full depth"]
    console.table(
        ("", "calibration", "log"),
        [
            (depth, f"{was:.1%}", f"{now:.1%}")
            for depth, was, now in zip(depths, exits.calibration, exits.log, strict=True)
        ],
    )
    facts = {"exits taken": _said(exits.comparison)}
    for each in drift.confidence:
        said = "no tokens to compare" if each.comparison is None else _said(each.comparison)
        facts[f"confidence at exit {each.blocks}"] = said
    console.facts(facts | {"disagreement": _disagreement(drift)})
    console.print()


def _said(comparison: Comparison) -> str:
    drifted = "drifted" if comparison.drifted else "as calibrated"
    return f"{drifted} (distance {comparison.distance:.3f}, p = {comparison.p_value:.2g})"


def _disagreement(drift: DomainDrift) -> str:
    found = drift.disagreement
    before = f"{found.calibration:.1%} calibrated, {found.limit:.1%} promised"
    if found.estimate is None:
        return f"{before}; no token was compared"
    said = f"ALARM after {found.alarm_at} requests" if found.alarm else "no alarm"
    return f"{found.estimate:.1%} ({found.lower:.1%} to {found.upper:.1%}), {before}: {said}"


def _summary(report: DriftReport) -> str:
    broken = [drift.domain or "no domain named" for drift in report.domains
              if drift.disagreement.alarm]  # fmt: skip
    if broken:
        return f"the promise is broken in: {', '.join(broken)}"
    return "no alarm; the intervals say what the log leaves open"
