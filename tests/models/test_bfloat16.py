"""bf16 by its bits against ml_dtypes, which builds use."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ojfa_export.models.bfloat16 import rounded, widened


def test_every_number_is_widened_and_rounded_to_itself():
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(widened(bits), numbers)
    kept = ~np.isnan(numbers)
    np.testing.assert_array_equal(rounded(numbers)[kept], bits[kept])
    assert np.isnan(widened(rounded(numbers[~kept]))).all()


def test_the_nearest_is_taken_and_the_even_one_of_two(rng):
    numbers = rng.integers(1 << 32, size=100_000, dtype=np.uint32)
    numbers[:1000] = numbers[:1000] & 0xFFFF0000 | 0x8000  # half way
    numbers[1000:1010] = 0x7F7FFFFF, 0x7F7F8000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, *range(5)
    given = numbers.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = given.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(widened(rounded(given)), expected)


def test_other_types_are_widened_as_they_are():
    for dtype in (np.float16, np.float32):
        assert widened(np.array([1.5], dtype)).tolist() == [1.5]
