"""Parts of models, and GPUs, that the TensorRT backend has no kernels of."""

from __future__ import annotations

from ojfa_export.backends.tensorrt.plan import has_engines
from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# Numbers of 16 bits that a kernel loads at once: rows of matrices are whole loads.
LOADED = 8
COMPUTE_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)  # has an instruction that widens 8-bit floats
WORD = 4  # bytes, of which whole ones are copied


def check_parts(spec: ModelSpec) -> None:
    """Refuses models with parts that there are no kernels of.

    Raises:
        BackendError: Naming the part.
    """
    parts = {
        "norms after attention and MLP alone": spec.norms == "after",
        "LayerNorms after attention and MLP": spec.norms == "both" and spec.norm == "layer",
        "attention and MLP side by side": spec.parallel,
        "norms over all heads of queries and of keys": spec.qk_norm == "projection",
    }
    for part, there in parts.items():
        if there:
            raise BackendError(
                f"this model has {part}, which the TensorRT backend doesn't run",
                hint="build it with '--backend onnxruntime' or '--backend onnxruntime-cuda'",
            )


def check_rows(spec: ModelSpec, precision: Precision, form: WeightFormat | None = None) -> None:
    """Refuses models with matrices that kernels can't load, where no engine runs them instead.

    Raises:
        BackendError: Naming the size.
    """
    if has_engines(precision, form):
        return
    sizes = {
        "a hidden size": spec.hidden_size,
        "an MLP": spec.intermediate_size,
        "attention": spec.heads * spec.head_dim,
    }
    for what, size in sizes.items():
        if size % LOADED:
            raise BackendError(
                f"this model has {what} of {size} features, which is no multiple of {LOADED}: no "
                f"kernel runs that in {precision if form is None else form.storage}",
                hint="build it with '--precision fp16', without --weights",
            )


def check_gpu(name: str, compute_capability: tuple[int, int]) -> None:
    """Refuses a GPU that the kernels don't run on.

    Raises:
        BackendError: Naming it and what it has.
    """
    if compute_capability < COMPUTE_CAPABILITY:
        needed, here = (".".join(map(str, v)) for v in (COMPUTE_CAPABILITY, compute_capability))
        raise BackendError(
            f"the CUDA kernels need compute capability {needed} or later; {name} has {here}",
            hint="use another GPU, or the backend 'onnxruntime'",
        )


def float8_lacks(name: str, compute_capability: tuple[int, int]) -> str | None:
    """What a GPU lacks to run 8-bit floats, to be said after them; None where it runs them."""
    if compute_capability >= FLOAT8_CAPABILITY:
        return None
    needed, here = (".".join(map(str, v)) for v in (FLOAT8_CAPABILITY, compute_capability))
    return f"which need a GPU of compute capability {needed} or later; {name} has {here}"


def check_fp8_cache(spec: ModelSpec, name: str, compute_capability: tuple[int, int]) -> None:
    """Refuses what has no kernels for keys and values in fp8.

    Raises:
        BackendError: Naming the GPU and what it has, or the heads.
    """
    if lacks := float8_lacks(name, compute_capability):
        raise BackendError(f"keys and values in fp8, {lacks}", hint="build without --cache")
    if spec.head_dim % WORD:
        raise BackendError(
            f"this model has heads of {spec.head_dim} features, no multiple of {WORD}: no kernel "
            "keeps those in fp8",
            hint="build without --cache",
        )
