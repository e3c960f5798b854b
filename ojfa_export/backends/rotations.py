"""Which rows of the tables of rotations a pass uses."""

from __future__ import annotations

from ojfa_export.models.spec import ModelSpec


def rows_of_sets(spec: ModelSpec, rows: int, *, long_context: bool) -> list[slice]:
    """Those of each set of rotary factors that blocks take, in the order of `spec.rotations`.

    Args:
        spec: The model.
        rows: Of the tables, where a second set's follow the first's.
        long_context: Whether LongRoPE's long factors apply.
    """
    if spec.rotary_sets == 1:
        return [slice(0, rows)]
    first, second = slice(0, rows // 2), slice(rows // 2, rows)
    if spec.rotated_second:
        return [first, second]
    return [second if long_context else first]
