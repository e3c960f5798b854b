"""Parts of models that the TensorRT backend has no kernels of."""

from __future__ import annotations

from ojfa_export.errors import BackendError
from ojfa_export.models.spec import ModelSpec


def check_parts(spec: ModelSpec) -> None:
    """Refuses models with parts that there are no kernels of.

    Raises:
        BackendError: Naming the part.
    """
    parts = {
        "norms after attention and MLP": spec.norms_are("after"),
        "attention and MLP side by side": spec.parallel,
        "norms over all heads of queries and of keys": spec.qk_norm == "projection",
        "sliding windows in some blocks only": bool(spec.windowed),
        "two sets of rotations": bool(spec.rotated_second),
        "softcaps": spec.attention_softcap is not None or spec.logit_softcap is not None,
    }
    for part, there in parts.items():
        if there:
            raise BackendError(
                f"this model has {part}, which the TensorRT backend doesn't run",
                hint="build it with '--backend onnxruntime' or '--backend onnxruntime-cuda'",
            )
