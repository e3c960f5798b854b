"""The stage that gives a build its check head: how many tokens, which, and where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Backend
from ojfa_export.backends.checks import RunsChecks
from ojfa_export.backends.frugal import frugal
from ojfa_export.bundle.block_shortcut import BlockShortcut
from ojfa_export.bundle.check_entry import CheckEntry
from ojfa_export.bundle.names import CHECK_HEAD, SHORTCUT
from ojfa_export.bundle.shortcut_entry import ShortcutEntry
from ojfa_export.bundle.shortcut_file import load_exit
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.compiler.describe import describe_slice, describe_some
from ojfa_export.compiler.golden import decided_golden
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.compiler.self_text import read_self_text
from ojfa_export.compiler.stages import build_engines, engine_set, open_engines
from ojfa_export.compiler.work import Work
from ojfa_export.decoding.arrays import Int32
from ojfa_export.graphs.export import Exporter
from ojfa_export.models.spec import ModelSpec
from ojfa_export.planning.traffic import block_bytes, exit_head_bytes, head_bytes
from ojfa_export.promises.windows import PromiseWindows, tuning_part
from ojfa_export.system.progress import Progress

KEPT = "check.json"
# Where nothing is asked: so many tokens, of a vocabulary that is several times as large, and where
# a check would read at least this share of what a token reads (docs/policies.md has the figures).
DEFAULT_TOKENS = 4096
LEAST_VOCABULARY = 4 * DEFAULT_TOKENS
LEAST_SHARE = 0.1


def may_check(inputs: Inputs) -> bool:
    """Whether the build has the stage: it was asked for, or may turn out to be worth it."""
    asked = inputs.settings.check_vocabulary
    if asked is not None:
        return asked > 0
    is_large = inputs.checkpoint.spec.vocab_size >= LEAST_VOCABULARY
    backend = inputs.backend
    is_run = isinstance(backend, RunsChecks) and backend.checks_by_default
    return is_run and is_large and inputs.options.limits is not None


def make_check(inputs: Inputs, work: Work, exporter: Exporter, progress: Progress) -> None:
    """Writes the check head's graph and engine, and keeps what the manifest says of it."""
    count, reason = _choose(inputs, work)
    if not count:
        return
    own = None if inputs.self_text is None else read_self_text(inputs.self_text, work)
    counts = count_tokens(inputs, own)
    tokens = frequent(counts, inputs.checkpoint.spec.eos_token_ids, count)
    share = counts[tokens].sum() / counts.sum()
    bundle, spec = work.bundle, inputs.checkpoint.spec
    entry = CheckEntry(
        tokens=describe_slice(exporter.check_head(tokens, _whole_head(inputs))),
        reason=f"{count:,} of {spec.vocab_size:,} tokens, {share:.1%} of the text they were "
        f"counted in: {reason}",
        graphs=describe_some(bundle, [CHECK_HEAD]),
        engines=(),
    )
    build_check_engine(entry, bundle, spec, inputs.backend, progress)
    entry = checked_by(entry, bundle, inputs.backend)
    (work.scratch / KEPT).write_text(entry.model_dump_json(), encoding="utf-8")


def kept_check(work: Work) -> CheckEntry | None:
    """What `make_check` kept; None where there is no check head."""
    path = work.scratch / KEPT
    if not path.is_file():
        return None
    return CheckEntry.model_validate_json(path.read_text(encoding="utf-8"))


def with_golden(check: CheckEntry | None, inputs: Inputs, work: Work) -> CheckEntry | None:
    """The entry with tokens of a policy that the finished engines must reproduce."""
    if check is None:
        return None
    spec, settings = inputs.checkpoint.spec, inputs.settings
    golden = decided_golden(
        spec,
        frugal(open_engines(inputs, work), spec),
        inputs.windows.held_out,
        settings.max_cache_length,
        settings.precision,
    )
    return check.model_copy(update={"golden": golden})


def build_check_engine(
    entry: CheckEntry, bundle: Path, spec: ModelSpec, backend: Backend, progress: Progress
) -> None:
    """Builds a backend's engine of a check head."""
    build_engines(bundle, [CHECK_HEAD], spec.with_vocabulary(entry.size), backend, progress)


def checked_by(entry: CheckEntry, bundle: Path, backend: Backend) -> CheckEntry:
    """The entry with the engine that a backend has built."""
    others = [each for each in entry.engines if each.backend != backend.name]
    engines = (*others, engine_set(bundle, backend, [CHECK_HEAD]))
    return entry.model_copy(update={"engines": engines})


def count_tokens(inputs: Inputs, self_text: PromiseWindows | None) -> NDArray[np.float64]:
    """How often each token comes [V] in text that no promise is shown on.

    The windows of certification are left out: thresholds are of the head that is chosen here, and
    must not depend on them. Files and self-text, where there is any, count the same.

    Args:
        inputs: Of the build.
        self_text: What the model wrote, if it did.
    """
    windows = inputs.windows
    files = [windows.fit, windows.held_out, *map(tuning_part, windows.rest)]
    kinds = [files]
    if self_text is not None:
        kinds.append(list(self_text.tuning))
    size = inputs.checkpoint.spec.vocab_size
    shares = np.zeros(size)
    for texts in kinds:
        ids = np.concatenate([each.ravel() for each in texts])
        shares += np.bincount(ids, minlength=size) / max(ids.size, 1)
    return shares


def frequent(counts: NDArray[np.float64], always: tuple[int, ...], size: int) -> Int32:
    """The most frequent tokens, the lower ids of equals; ids [size], rising.

    Args:
        counts: [V].
        always: Tokens that are taken whatever their count, as those that end a text.
        size: How many.
    """
    ranked = counts.copy()
    ranked[list(always)] = np.inf
    chosen: Int32 = np.sort(np.argsort(-ranked, kind="stable")[:size]).astype(np.int32)
    return chosen


def _whole_head(inputs: Inputs) -> str:
    """The graph of the exit head; behind exits' blocks it is the model's own."""
    return "final_head" if isinstance(inputs.given.exits, BlockShortcut) else "exit_head"


def _choose(inputs: Inputs, work: Work) -> tuple[int, str]:
    """How many tokens, 0 for no check head, and why."""
    asked = inputs.settings.check_vocabulary
    if asked is not None:
        return asked, "as asked"
    shortcut = ShortcutEntry.of(load_exit(work.bundle / SHORTCUT)[0])
    return default_size(inputs.checkpoint.spec, shortcut, inputs.weight_format)


def default_size(
    spec: ModelSpec, shortcut: ShortcutEntry, form: WeightFormat | None
) -> tuple[int, str]:
    """How many tokens where nothing is asked, 0 for no check head, and why.

    Args:
        spec: The model.
        shortcut: Of its exit head.
        form: What quantised weights are stored as, where they are.
    """
    # A block behind an exit runs for every check, whatever head follows it.
    whole = head_bytes(spec, form)
    check = exit_head_bytes(spec, shortcut, form) if shortcut.blocks is None else whole
    share = check / (spec.blocks * block_bytes(spec, form) + whole)
    said = f"a check of the exit head would read {share:.0%} of what a token of full depth does"
    is_large = spec.vocab_size >= LEAST_VOCABULARY and share >= LEAST_SHARE
    return (DEFAULT_TOKENS if is_large else 0), said
