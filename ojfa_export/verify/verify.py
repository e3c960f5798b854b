"""`ojfa-export verify`: a bundle against its golden tokens, and against its checkpoint."""

from __future__ import annotations

from pathlib import Path

from ojfa_export.bundle.bundle import Bundle
from ojfa_export.errors import BundleError, CheckpointError
from ojfa_export.progress import Progress
from ojfa_export.report.model import Check
from ojfa_export.runtime.model import Model

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
    from ojfa_export.verify.golden import verify_golden

    opened = Bundle(bundle)
    model = Model(opened, backend)
    checks = verify_golden(model)
    if against is None:
        if not checks:  # random weights, say: no token leads the others clearly
            raise BundleError(
                f"{bundle} has no golden tokens to verify with",
                hint="compare it with its checkpoint: --against CHECKPOINT",
            )
        return checks
    from ojfa_export.checkpoint.checkpoint import Checkpoint
    from ojfa_export.checkpoint.hub import resolve
    from ojfa_export.verify.checks import verify_against
    from ojfa_export.verify.sample import sample_token_ids

    directory = resolve(against, revision)
    if Checkpoint(directory).sha256() != opened.manifest.model.sha256:
        raise CheckpointError(
            f"{bundle} was not built from {against}: the digests of config and weights differ",
            hint="name the checkpoint that the bundle was built from",
        )
    token_ids = sample_token_ids(model, TOKENS)
    return checks + verify_against(
        opened, model, directory, token_ids, progress, trust_remote_code=trust_remote_code
    )
