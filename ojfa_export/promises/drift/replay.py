"""Runs logged requests through a bundle as a service would, under watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ojfa_export.bundle.names import STATISTICS
from ojfa_export.bundle.promise import Promise
from ojfa_export.decoding.events import Event
from ojfa_export.decoding.policy import ExitPolicy
from ojfa_export.errors import BundleError, LogError, UsageError
from ojfa_export.models.tokenizer import encode
from ojfa_export.promises.drift.log import Request
from ojfa_export.promises.drift.read import read_text
from ojfa_export.promises.drift.unit import Unit, request_unit
from ojfa_export.promises.statistics import ExitStatistics, load_statistics
from ojfa_export.runtime.disagreement import DisagreementMonitor, State
from ojfa_export.runtime.model import Model
from ojfa_export.runtime.monitor import Monitor
from ojfa_export.system.progress import Progress


@dataclass(frozen=True)
class Replayed:
    """A request, what the policy did to it, and what was known of its domain after it."""

    request: Request
    unit: Unit
    state: State


@dataclass(frozen=True)
class Watched:
    """What a bundle must have to be watched.

    Attributes:
        policy: When its tokens leave early.
        promise: What is watched.
        statistics: The windows behind the promise: the certification split.
    """

    policy: ExitPolicy
    promise: Promise
    statistics: ExitStatistics


def watched(model: Model) -> Watched:
    """What a bundle has to be watched by.

    Raises:
        BundleError: It has no policy, promise or statistics, or it never leaves early.
    """
    directory, build = model.bundle.directory, "ojfa-export build CHECKPOINT -o BUNDLE"
    policy, promise = model.auto_policy(), model.manifest.promise
    if promise is None:
        raise BundleError(
            f"{directory} has no promise to watch",
            hint=f"build it with '{build} --max-disagreement 0.05'",
        )
    if not policy.exits:
        raise BundleError(
            f"the exit 'auto' of {directory} is full depth: no token leaves early, and nothing "
            "can drift",
            hint=f"promise less: '{build} --max-disagreement X' with an X above "
            f"{promise.limits.max_disagreement:g}",
        )
    if STATISTICS not in model.manifest.files:
        raise BundleError(
            f"{directory} has no calibration statistics of its exits",
            hint=f"build it with '{build} --max-disagreement 0.05'",
        )
    splits = load_statistics(model.bundle.path(STATISTICS))
    return Watched(policy, promise, splits["certification"])


def replay(
    model: Model,
    requests: Sequence[Request],
    promise: Promise,
    progress: Progress,
    *,
    share: float,
    false_alarms: float,
    max_new_tokens: int,
    seed: int,
) -> list[Replayed]:
    """Runs each request by itself at the exit "auto".

    Args:
        model: With the promise.
        requests: In the order in which they came. Prompts are gone on from greedily; texts are
            read as they are, as far as the bundle's cache holds them.
        promise: What is tested.
        progress: Shows requests.
        share: The probability that a token is compared with the full model.
        false_alarms: Of the test; see `DisagreementMonitor`.
        max_new_tokens: For each prompt.
        seed: Of the choice of tokens.

    Raises:
        LogError: A prompt that doesn't fit in the bundle's cache.
        UsageError: A number out of range.
    """
    told: list[Event] = []
    disagreement = DisagreementMonitor(promise, false_alarms)
    monitor = Monitor(share, disagreement, on_event=told.append, seed=seed)
    encoded = [_encode(model, request) for request in requests]
    policy = model.auto_policy()
    replayed = []
    with progress.task("replaying the log", len(requests), "requests") as task:
        for request, ids in zip(requests, encoded, strict=True):
            if request.generate:
                told.clear()
                model.generate(
                    request.content,
                    exit=policy,
                    max_new_tokens=max_new_tokens,
                    monitor=monitor,
                    domain=request.domain,
                )
                unit = request_unit(told, policy)
            else:
                session = model.session(max_length=len(ids))
                unit = read_text(session, ids, policy, monitor.shadow())
                disagreement.update([] if unit.loss is None else [unit.loss], request.domain)
            replayed.append(Replayed(request, unit, disagreement.state(request.domain)))
            task.advance()
    return replayed


def _encode(model: Model, request: Request) -> list[int]:
    """A request's tokens, checked before the first one runs."""
    try:
        if request.generate:
            return model.encode(request.content)
        ids = encode(model.tokenizer, request.content)
    except UsageError as error:
        raise LogError(f"{request.place}: {error.message}", hint=error.hint) from error
    if not ids:
        raise LogError(f"{request.place}: 'text' has no tokens", hint="leave the line out")
    return ids[: model.manifest.cache.max_length]


def by_domain(replayed: Sequence[Replayed]) -> dict[str | None, list[Replayed]]:
    """The requests of each domain, in the order of their first one; those without one last."""
    domains: dict[str | None, list[Replayed]] = {}
    for each in replayed:
        domains.setdefault(each.request.domain, []).append(each)
    unknown = domains.pop(None, None)
    return domains if unknown is None else {**domains, None: unknown}
