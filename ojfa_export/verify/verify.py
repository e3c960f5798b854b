"""`ojfa-export verify`: a bundle against its golden tokens, and against its checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ojfa_export import backends
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.bundle.names import SHORTCUT
from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import BundleError, CheckpointError
from ojfa_export.runtime.model import Model
from ojfa_export.system.progress import Progress
from ojfa_export.verify.change import Change
from ojfa_export.verify.check import Check
from ojfa_export.verify.tolerances import arithmetic_of_model

TOKENS = 48


def verify_bundle(
    bundle: Path,
    against: str | None,
    backend: str,
    progress: Progress,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Check]:
    """Verifies a bundle where it runs.

    Args:
        bundle: Its directory.
        against: Checkpoint to compare with through transformers; None for the golden tokens alone.
        backend: Engines to verify.
        progress: Shows what is compared.
        revision: Of a hub id in `against`.
        trust_remote_code: Whether transformers may run code in the checkpoint.

    Raises:
        OjfaError: The bundle or the checkpoint can't be read, or they are of different models.
    """
    return verify_model(
        open_model(bundle, backend),
        against,
        backend,
        progress,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )


def open_model(bundle: Path, backend: str) -> Model:
    """Opens a bundle to verify it: once, as that reads every file.

    Raises:
        OjfaError: It can't be read.
    """
    return Model(Bundle(bundle), backend)


def verify_model(
    model: Model,
    against: str | None,
    backend: str,
    progress: Progress,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Check]:
    """Verifies an opened bundle; see `verify_bundle`."""
    from ojfa_export.verify.golden import verify_golden, verify_spec

    opened = model.bundle
    checks = [verify_spec(opened.manifest), *verify_golden(model)]
    if can_compare_blocks():
        checks += compare_blocks(opened, model, backend, progress)
    if against is None:
        return checks
    from ojfa_export.models.checkpoint.checkpoint import Checkpoint
    from ojfa_export.models.checkpoint.hub import resolve
    from ojfa_export.verify.checks import verify_against
    from ojfa_export.verify.sample import sample_token_ids

    directory = resolve(against, revision)
    described = opened.manifest.model
    if Checkpoint(directory, described.ignored_fields).sha256() != described.sha256:
        raise CheckpointError(
            f"{opened.directory} was not built from {against}: the digests of config and weights "
            "differ",
            hint="name the checkpoint that the bundle was built from",
        )
    token_ids = sample_token_ids(model, TOKENS)[: opened.manifest.cache.max_batch_size]
    return checks + verify_against(
        opened, model, directory, token_ids, progress, trust_remote_code=trust_remote_code
    )


def quantisation_change(
    model: Model,
    against: str,
    progress: Progress,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Change | None:
    """What quantising changed, on the texts that ship; None where nothing is quantised.

    Args:
        model: That `verify_model` has compared with the same checkpoint.
        against: As there, and so the others.
        progress: Shows windows.
        revision: Of a hub id.
        trust_remote_code: Whether transformers may run code in the checkpoint.
    """
    from ojfa_export.models.checkpoint.checkpoint import Checkpoint
    from ojfa_export.models.checkpoint.hub import resolve
    from ojfa_export.verify.quantised import WINDOW_TOKENS, measure_change
    from ojfa_export.verify.sample import sample_token_ids

    if model.manifest.weights is None:
        return None
    return measure_change(
        model,
        Checkpoint(resolve(against, revision), model.manifest.model.ignored_fields),
        sample_token_ids(model, min(WINDOW_TOKENS, model.spec.max_positions)),
        progress,
        trust_remote_code=trust_remote_code,
    )


def can_compare_blocks() -> bool:
    """Whether the packages are here that `compare_blocks` needs beside those that run a bundle."""
    return all(find_spec(package) for package in ("onnx", "safetensors"))


def has_reference() -> bool:
    """Whether transformers, the reference for whole models, can run here."""
    return all(find_spec(package) for package in ("accelerate", "torch", "transformers"))


def compare_blocks(
    bundle: Bundle, model: Model, backend: str, progress: Progress, token_ids: Int32 | None = None
) -> list[Check]:
    """Compares a bundle's engines with float64 on the bundle's own weights.

    Args:
        bundle: The bundle.
        model: The same, opened.
        backend: Whose engines the model runs.
        progress: Shows blocks.
        token_ids: [B,S] within the bundle's cache; default: the texts that ship.
    """
    from ojfa_export.bundle.shortcut_file import load_exit
    from ojfa_export.verify.blocks import make_subject, verify_blocks
    from ojfa_export.verify.draft import verify_draft
    from ojfa_export.verify.sample import sample_token_ids

    manifest, tables = bundle.manifest, bundle.manifest.rotary
    if token_ids is None:
        token_ids = sample_token_ids(model, TOKENS)[: manifest.cache.max_batch_size]
    shortcut = load_exit(bundle.path(SHORTCUT))[0]
    try:
        shortcut.check_fits(model.spec)
    except ValueError as error:
        raise BundleError(
            f"{bundle.directory / SHORTCUT} is of another model: {error}",
            hint="don't use this bundle: build it again",
        ) from error
    subject = make_subject(
        model.spec,
        arithmetic_of_model(model),
        bundle.graphs,
        (bundle.tensor(tables.cos), bundle.tensor(tables.sin)) if tables else None,
        shortcut,
        model.engines,
        backends.load(backend),
        bundle.check_tokens(),
    )
    with np.errstate(invalid="ignore", over="ignore"):  # a check that fails says it
        checks = verify_blocks(subject, token_ids, progress)
        return checks + verify_draft(bundle, model.drafts)
