"""What the figures of a comparison say of the claims that are made for shortcuts.

Each claim is decided from the numbers by the rule in its sentence.
"""

from __future__ import annotations

import numpy as np

from ojfa_export.shortcuts.comparison.model import Claim, Comparison
from ojfa_export.shortcuts.kinds import Kind

OJFA, N_NJTC, OURS = "arXiv 2504.13984", "arXiv 2409.14091", "this project"
NEAR_MULTI_JUMP = 0.03
SIMILARITY_LOSS = 0.01
STABLE = 0.9
SPEED_UP = 20
P1 = "precision_at_1"


def judge(report: Comparison) -> list[Claim]:
    """All claims, with what was found."""
    return [
        _near_multi_jump(report),
        _arbitrary_level(report),
        _middle_level(report),
        _similarity(report),
        _mixed(report),
        _fewer_than_jtc(report),
        _fewer_at_inference(report),
        _norm_helps(report),
        _better_than_identity(report, "n-njtc"),
        _better_than_identity(report, "ojfa"),
        _keeps_jtc(report),
        *([_closed_form(report)] if report.descent else []),
        *(_residual(report, kind) for kind in ("identity", "n-njtc", "ojfa", "jtc")),
    ]


def _mean(report: Comparison, kind: Kind) -> float:
    return report.of(kind).mean(P1)


def _near_multi_jump(report: Comparison) -> Claim:
    gap = _mean(report, "n-njtc") - _mean(report, "ojfa")
    losses = _gains(report, "n-njtc", "ojfa")
    worst = int(losses.argmax())
    return Claim(
        source=OJFA,
        statement="One jump serves every exit: its mean Precision@1 is within 0.03 of a jump for "
        "each exit.",
        holds=gap <= NEAR_MULTI_JUMP,
        evidence=f"{_mean(report, 'ojfa'):.3f} against {_mean(report, 'n-njtc'):.3f}, "
        f"{gap:+.3f} behind, with 1/{report.blocks - 1} of the parameters; most at exit "
        f"{worst + 1}, {losses[worst]:+.3f}. The jump is fitted at exit "
        f"{report.of('ojfa').fitted_at}.",
    )


def _arbitrary_level(report: Comparison) -> Claim:
    means = np.mean(report.precision_at_1, axis=1)
    return Claim(
        source=OJFA,
        statement="An arbitrary level does not do: the worst level's mean Precision@1 is below "
        "0.9 of the best level's.",
        holds=bool(means.min() < STABLE * means.max()),
        evidence=f"best {means.max():.3f} (level {means.argmax() + 1}), average "
        f"{means.mean():.3f}, worst {means.min():.3f} (level {means.argmin() + 1}).",
    )


def _middle_level(report: Comparison) -> Claim:
    means = np.mean(report.precision_at_1, axis=1)
    best, blocks = int(means.argmax()) + 1, report.blocks
    return Claim(
        source=OJFA,
        statement="The best level is a middle one: from a quarter to three quarters of the depth.",
        holds=blocks / 4 <= best <= 3 * blocks / 4,
        evidence=f"level {best} of {blocks} blocks; mean Precision@1 by level: "
        + ", ".join(f"{mean:.3f}" for mean in means)
        + ".",
    )


def _similarity(report: Comparison) -> Claim:
    loss = _mean(report, "ojfa") - _mean(report, "ojfa-cosine")
    return Claim(
        source=OJFA,
        statement="A similarity between jumps finds the level: its mean Precision@1 is within 0.01 "
        "of the measured choice's. (The paper's measure is not known; here it is the cosine of the "
        "linear maps.)",
        holds=loss <= SIMILARITY_LOSS,
        evidence=f"level {report.of('ojfa-cosine').fitted_at} with "
        f"{_mean(report, 'ojfa-cosine'):.3f}, measured level {report.of('ojfa').fitted_at} with "
        f"{_mean(report, 'ojfa'):.3f}.",
    )


def _mixed(report: Comparison) -> Claim:
    return Claim(
        source=OJFA,
        statement="A jump of one level is better than one jump fitted on all levels mixed, by mean "
        "Precision@1.",
        holds=_mean(report, "ojfa") > _mean(report, "mixed"),
        evidence=f"{_mean(report, 'ojfa'):.3f} against {_mean(report, 'mixed'):.3f} mixed.",
    )


def _fewer_than_jtc(report: Comparison) -> Claim:
    share = report.of("n-njtc").parameters / report.of("jtc").parameters
    return Claim(
        source=N_NJTC,
        statement="N-NJTC has over 97% fewer parameters than JTC.",
        holds=share < 0.03,
        evidence=f"{1 - share:.1%} fewer at rank {report.rank} and hidden size "
        f"{report.hidden_size}; the paper's rank here is {max(1, report.hidden_size // 100)}.",
    )


def _fewer_at_inference(report: Comparison) -> Claim:
    exits = report.blocks - 1
    return Claim(
        source=OJFA,
        statement="One jump has over 30 times fewer parameters than a jump for each exit.",
        holds=exits > 30,
        evidence=f"{exits} times: as many as there are exits.",
    )


def _norm_helps(report: Comparison) -> Claim:
    return Claim(
        source=N_NJTC,
        statement="Normalising the input helps: N-NJTC's mean Precision@1 is above NJTC's.",
        holds=_mean(report, "n-njtc") > _mean(report, "njtc"),
        evidence=f"{_mean(report, 'n-njtc'):.3f} against {_mean(report, 'njtc'):.3f}; fitted in "
        "closed form, the norm adds a bias and nothing else.",
    )


def _better_than_identity(report: Comparison, kind: Kind) -> Claim:
    gains = _gains(report, kind, "identity")
    behind = (np.flatnonzero(gains < 0) + 1).tolist()
    return Claim(
        source=OJFA if kind == "ojfa" else N_NJTC,
        statement=f"{report.of(kind).title}: better than no jump at every exit, by Precision@1.",
        holds=bool((gains > 0).all()),
        evidence=f"mean {_mean(report, kind):.3f} against {_mean(report, 'identity'):.3f}; "
        + (f"behind at exits {_list(behind)}, " if behind else "")
        + f"from {gains.min():+.3f} to {gains.max():+.3f}.",
    )


def _keeps_jtc(report: Comparison) -> Claim:
    share = _mean(report, "n-njtc") / max(_mean(report, "jtc"), 1e-12)
    return Claim(
        source=N_NJTC,
        statement="A narrow jump for each exit keeps 0.9 of JTC's mean Precision@1 or more.",
        holds=share >= STABLE,
        evidence=f"{_mean(report, 'n-njtc'):.3f} against {_mean(report, 'jtc'):.3f}, at "
        f"{report.of('n-njtc').parameters / report.of('jtc').parameters:.1%} of its parameters.",
    )


def _closed_form(report: Comparison) -> Claim:
    losses = np.array([each.descent_loss / each.closed_loss - 1 for each in report.descent])
    closed = sum(each.closed_seconds for each in report.descent)
    descent = sum(each.descent_seconds for each in report.descent)
    return Claim(
        source=OURS,
        statement=f"The closed form reaches gradient descent's loss or a lower one at every level, "
        f"at least {SPEED_UP} times faster.",
        holds=bool((losses >= 0).all() and descent >= SPEED_UP * closed),
        evidence=f"descent ends {losses.min():.2%} to {losses.max():.2%} above it, after "
        f"{descent / max(closed, 1e-9):.0f} times the processor time ({descent:.1f} s against "
        f"{closed:.2f} s).",
    )


def _residual(report: Comparison, other: Kind) -> Claim:
    gains = _gains(report, "residual", other)
    behind = (np.flatnonzero(gains < 0) + 1).tolist()
    mine, theirs = report.of("residual").parameters, report.of(other).parameters
    return Claim(
        source=OURS,
        statement=f"The shared residual jump is at least as good as {report.of(other).title} at "
        "every exit, by Precision@1.",
        holds=not behind,
        evidence=f"mean {_mean(report, 'residual'):.3f} against {_mean(report, other):.3f}; "
        + (f"behind at exits {_list(behind)}, " if behind else "")
        + f"from {gains.min():+.3f} to {gains.max():+.3f}; {mine:,} parameters against "
        f"{theirs:,}; a check takes {report.of('residual').check.milliseconds:.3f} ms against "
        f"{report.of(other).check.milliseconds:.3f}.",
    )


def _gains(report: Comparison, kind: Kind, other: Kind) -> np.ndarray:
    """Precision@1 of a kind above another's, by exit."""
    pairs = zip(report.of(kind).exits, report.of(other).exits, strict=True)
    return np.array([mine.precision_at_1 - theirs.precision_at_1 for mine, theirs in pairs])


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
