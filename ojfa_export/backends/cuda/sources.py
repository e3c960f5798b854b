"""The CUDA sources, and what they are compiled with for a model."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from ojfa_export.bundle.weight_format import WeightFormat
from ojfa_export.errors import BackendError
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec

# In a checkout the sources lie beside the package; a wheel carries them inside.
PLACES = (
    Path(__file__).parents[3] / "engines" / "kernels",
    Path(__file__).parents[2] / "_engines" / "kernels",
)
SOURCES = (
    "linear.cu",
    "tiled_linear.cu",
    "narrow_linear.cu",
    "quantised_linear.cu",
    "quantised_batch.cu",
    "quantised_layout.cu",
    "around_products.cu",
    "qk_norm.cu",
    "attention.cu",
    "prompt.cu",
    "embed.cu",
    "choose.cu",
    "sample.cu",
    "exit_check.cu",
    "draft.cu",
    "exit_block.cu",
)
HEADERS = (
    "element.cuh",
    "common.cuh",
    "words.cuh",
    "instructions.cuh",
    "activation.cuh",
    "staging.cuh",
    "float8.cuh",
    "numbers.cuh",
    "quantised_products.cuh",
    "tiles.cuh",
    "choose.cuh",
)
# A small model's hidden states have up to so many features.
SMALL_WIDTH = 1024
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def definitions(
    spec: ModelSpec,
    precision: Precision,
    form: WeightFormat | None = None,
    *,
    fp8_cache: bool = False,
) -> dict[str, int]:
    """The macros that the kernels are compiled with, for matrices of a precision.

    Args:
        spec: The model.
        precision: Of the matrices, and of what quantised ones multiply.
        form: What quantised matrices are stored as, where there are some.
        fp8_cache: Whether keys and values are kept in fp8.
    """
    return {
        "HALF": int(precision != "fp32"),
        "BFLOAT": int(precision == "bf16"),
        "FP8_CACHE": int(fp8_cache),
        "HEAD_DIM": spec.head_dim,
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv_heads,
        "ROTARY_DIM": spec.rotary_dim,
        "UNROTATED": int(not all(spec.rotated)),
        "WINDOW": spec.window or 0,
        "WINDOWS_DIFFER": int(bool(spec.windowed)),
        "SOFTCAP": _bits(spec.attention_softcap or 0.0),
        "NORM_LAYER": int(spec.norm == "layer"),
        "ACTIVATION": ACTIVATIONS[spec.activation],
        "GATED": int(spec.gated),
        "SMALL": int(spec.hidden_size <= SMALL_WIDTH),
        "HIDDEN_SIZE": spec.hidden_size,
        **weight_definitions(form),
    }


def weight_definitions(form: WeightFormat | None) -> dict[str, int]:
    """The macros that say what quantised matrices are stored as."""
    return {
        "WEIGHT_BITS": form.bits if form is not None else 0,
        "WEIGHT_FLOAT": int(form is not None and form.is_float),
        "WEIGHT_GROUP": form.group_size if form is not None else 0,
    }


def _bits(number: float) -> int:
    """Of a float32, as a macro can hold it."""
    return int.from_bytes(struct.pack("<f", number), "little")


def sources_digest() -> str:
    """Hex SHA-256 of all sources."""
    digest, directory = hashlib.sha256(), source_directory()
    for name in (*SOURCES, *HEADERS):
        digest.update((directory / name).read_bytes())
    return digest.hexdigest()


def source_directory() -> Path:
    """Where the sources are.

    Raises:
        BackendError: They are missing.
    """
    for place in PLACES:
        if place.is_dir():
            return place
    raise BackendError("the CUDA kernels are missing", hint="install ojfa-export again")
