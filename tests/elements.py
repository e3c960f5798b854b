"""What kernels are compiled for by precision, and the arrays that they are given then."""

from __future__ import annotations

from typing import Any, get_args

import ml_dtypes
import numpy as np

from ojfa_export.bundle.weight_format import Quantised, WeightFormat
from ojfa_export.models.precision import Precision

DTYPES: dict[Precision, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}


def split_precision(name: str) -> tuple[str, Precision]:
    """Of a case's name: what comes before its precision, and that; fp32 where it names none."""
    variant, _, last = name.rpartition("-")
    for precision in DTYPES:
        if last == precision:
            return variant, precision
    return name, "fp32"


def split_weights(name: str) -> tuple[str, WeightFormat | None]:
    """Of a case's name before its precision: what comes before quantised weights, and these."""
    variant, _, last = name.rpartition("-")
    if last not in get_args(Quantised):
        return name, None
    return variant, WeightFormat(storage=last, group_size=32, zero_points=last != "fp8")


def macros(precision: Precision) -> dict[str, int]:
    """As `backends.cuda.sources.definitions` has them."""
    return {"HALF": int(precision != "fp32"), "BFLOAT": int(precision == "bf16")}
