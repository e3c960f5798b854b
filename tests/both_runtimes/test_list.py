"""The list of what each runtime has is whole and up to date."""

from __future__ import annotations

import pytest
from both_runtimes.list import FILE, Unplaced, document
from both_runtimes.names import cpp_names, python_names


def test_the_list_is_what_the_runtimes_have():
    expected = document(python_names(), cpp_names())
    assert FILE.read_text(encoding="utf-8") == expected, "run python -m tests.both_runtimes.list"


def test_a_new_name_must_be_placed():
    python, cpp = python_names(), cpp_names()
    with pytest.raises(Unplaced, match=r"Python: Session\.advance\(new\)"):
        document([*python, "Session.advance(new)"], cpp)
    with pytest.raises(Unplaced, match="C\\+\\+: GenerateOptions::new"):
        document(python, [*cpp, "GenerateOptions::new"])
    with pytest.raises(Unplaced, match=r"Session::rewind\(row\)|Session\.rewind\(row\)"):
        document(python, [name for name in cpp if name != "Session::rewind(row)"])
