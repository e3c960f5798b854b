"""The stage that decides on exits: promise and default."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.backends.backend import Engines
from ojfa_export.bundle.names import STATISTICS
from ojfa_export.bundle.promise import DomainEvidence, Promise
from ojfa_export.compiler.decided import Decided, is_timed_whole
from ojfa_export.compiler.draft_stage import kept_draft, open_layer
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.stages import open_engines
from ojfa_export.compiler.statistics_stage import ROUNDS, SECONDS, kept_costs, time_steps
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.default import Default
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.drafting import measure_layer
from ojfa_export.planning.plan import plan_default
from ojfa_export.planning.rehearse import ROOM
from ojfa_export.planning.step_costs import StepCosts, measure_exits
from ojfa_export.planning.turns import Turns
from ojfa_export.promises.certify import certify
from ojfa_export.promises.self_text import DOMAIN
from ojfa_export.promises.statistics import ExitStatistics, load_statistics
from ojfa_export.system.heap import release_memory
from ojfa_export.system.progress import Progress


def decide(inputs: Inputs, work: Work, progress: Progress) -> None:
    """Certifies the promise that was asked, and plans the default by times on this machine.

    What was decided is kept in the scratch directory for the manifest. Timing takes both heads and
    some blocks at once: of a large model that is more than a build may take, and is done only
    where a promise needs it. Such a model's default is full depth; `plan` tells more. Nor is more
    timed than can change the default.
    """
    if is_timed_whole(inputs.checkpoint.spec) or inputs.options.limits is not None:
        decided = _decide(inputs, work, progress)
        release_memory()
        (work.scratch / "exits.json").write_text(decided.model_dump_json(), encoding="utf-8")


def _decide(inputs: Inputs, work: Work, progress: Progress) -> Decided:
    spec, limits = inputs.checkpoint.spec, inputs.options.limits
    large = not is_timed_whole(spec)
    engines, length = open_engines(inputs, work), inputs.settings.max_cache_length
    splits = load_statistics(work.bundle / STATISTICS)
    if limits is None and not _drafts(work):
        default = _full_depth_anyhow(spec, engines, length, splits, progress)
        if default is not None:
            return Decided(default=default)
    costs = time_steps(inputs, engines, progress) if limits is None else kept_costs(work)
    costs = _with_drafting(costs, inputs, work, engines, progress)
    promise = None
    if limits is not None:
        of_policies = costs.of_policies()
        promise = certify(splits["tuning"], splits["certification"], limits, of_policies)
        promise = _with_texts(promise, inputs)
    turns = None if large else Turns(spec, engines, length, ROOM)
    policy = promise.policy if promise else None
    default = plan_default(splits, costs, policy, turns, SECONDS, progress)
    return Decided(promise=promise, default=default)


def _full_depth_anyhow(
    spec: ModelSpec,
    engines: Engines,
    length: int,
    splits: Mapping[str, ExitStatistics],
    progress: Progress,
) -> Default | None:
    """Full depth, if no draft would pay even where passes over several tokens cost one token's.

    Most models need not be timed any further then; None where they do.
    """
    exits = measure_exits(spec, engines, length, rounds=ROUNDS, seconds=SECONDS, progress=progress)
    default = plan_default(splits, StepCosts.of_steps(exits), None)
    return default if default.speculation is None else None


def _drafts(work: Work) -> bool:
    """Whether a draft layer was built and counted."""
    kept = kept_draft(work)
    return kept is not None and bool(kept.acceptance)


def _with_drafting(
    costs: StepCosts, inputs: Inputs, work: Work, engines: Engines, progress: Progress
) -> StepCosts:
    """The costs, with those of the draft layer where one was built and counted."""
    kept = kept_draft(work)
    if kept is None or not kept.acceptance:
        return costs
    layer = open_layer(inputs, work, engines)
    if layer is None:
        return costs
    drafting = measure_layer(
        inputs.checkpoint.spec,
        engines,
        layer,
        kept.acceptance,
        inputs.settings.max_cache_length,
        ROUNDS,
        SECONDS,
        progress,
    )
    return costs.model_copy(update={"drafting": drafting})


def _with_texts(promise: Promise, inputs: Inputs) -> Promise:
    """The promise, its evidence with the text that it was made on."""

    def with_text(each: DomainEvidence) -> DomainEvidence:
        plan = inputs.self_text
        if plan is not None and each.name == DOMAIN:
            return each.model_copy(update={"made_on": "self-text", "text": plan.about})
        names = ", ".join(text.name for text in inputs.texts if text.domain == each.name)
        return each.model_copy(update={"text": names})

    return promise.model_copy(update={"domains": tuple(map(with_text, promise.domains))})
