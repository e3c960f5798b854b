"""What codes of 8-bit floats stand for, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ojfa_export.models.float8 import E4M3, LARGEST, last_place


def test_all_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(E4M3, expected)
    np.testing.assert_array_equal(np.signbit(E4M3[:254]), np.signbit(expected[:254]))
    assert np.nanmax(E4M3) == LARGEST


def test_a_last_place_is_how_far_the_next_number_is() -> None:
    numbers = np.sort(E4M3[:127])
    np.testing.assert_array_equal(last_place(numbers[:-1]), np.diff(numbers))
