"""What failed checks mean for whoever builds."""

from __future__ import annotations

from ojfa_export.backends.backend import Backend
from ojfa_export.backends.precisions import wider_than_fp16
from ojfa_export.errors import VerificationError
from ojfa_export.models.precision import Precision
from ojfa_export.verify.check import Check
from ojfa_export.verify.tolerances import RANGE, TOKENIZER


def raise_failed(
    checks: list[Check], reference: str, precision: Precision, backend: Backend
) -> None:
    """Refuses a build whose checks failed.

    Args:
        checks: In the order of the computation, so that the first that failed says where it began.
        reference: What was compared with.
        precision: Of the bundle.
        backend: Whose engines were checked.

    Raises:
        VerificationError: Some failed.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return
    first = failed[0]
    if first.name.startswith(RANGE):
        raise VerificationError(
            f"fp16 overflows in {first.name.removeprefix(RANGE)} reaches "
            f"{first.max_abs_diff:.3g}, fp16 holds {first.tolerance:.0f}",
            hint=f"nothing was written; build with {wider_than_fp16(backend)}",
        )
    hint = "please report this with the model's config.json"
    if first.name.startswith(TOKENIZER):
        hint = (
            "transformers tokenizes otherwise; save the tokenizer anew with "
            "AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(CHECKPOINT)"
        )
    elif precision != "fp32":
        hint = "--precision fp32 may pass"
    raise VerificationError(
        f"{len(failed)} of {len(checks)} checks failed against {reference}, the first: "
        f"{first.name} differs by {first.max_abs_diff:.3g}, tolerance {first.tolerance:.3g}",
        hint=f"nothing was written; {hint}",
    )
