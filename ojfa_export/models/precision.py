"""What a model is computed in; imports nothing, as help texts list it."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]
# Of a number.
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
