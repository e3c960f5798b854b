"""The three domains' texts, from what development machines have installed.

Every text here may be redistributed with its notices: PSF-2.0 (code), BSD-3-Clause and Apache-2.0
(docs), Apache-2.0 with or without the LLVM exceptions (headers).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from calibration.training.corpus import Document
from calibration.training.stdlib import read_stdlib, read_text

# Hosts of registries and hubs, and machines' own directories, are no text to learn.
_UNWANTED = re.compile(
    r"pypi\.|pythonhosted\.|npmjs\.|crates\.io|anaconda\.|debian\.org|huggingface\.co"
    r"|/(?:root|work)/|/home/\w+/",
    re.IGNORECASE,
)
PACKAGES = ("huggingface_hub", "networkx", "numpy", "sympy", "torch", "transformers")
_MIN_DOCSTRING_LENGTH = 200  # shorter ones are labels rather than prose
_MIN_REPETITION = 80  # shorter paragraphs, such as headings, may recur
_CODE_EXAMPLE = re.compile(r">>>|^\s*```", re.MULTILINE)
_HEADER_DIRECTORIES = ("llvm-14", "llvm-c-14", "openssl")
_HEADER_LICENCES = ("Apache License v2.0 with LLVM", "Licensed under the Apache License 2.0")
_LICENCE_LINES = 12  # a licence stands at the top of a file


def read_code(stdlib: Path) -> Iterator[Document]:
    """Yields the standard library's source files."""
    for document in read_stdlib(stdlib):
        if not _UNWANTED.search(document.text):
            yield document


def read_docs(site_packages: Path) -> Iterator[Document]:
    """Yields one document for each source file of `PACKAGES`: the prose of its long docstrings.

    A long paragraph that stands in several places stays in the first of them, so that no training
    document repeats a held-out one.
    """
    seen: set[str] = set()
    for package in PACKAGES:
        for path in sorted((site_packages / package).rglob("*.py")):
            texts = []
            for paragraphs in docstring_paragraphs(read_text(path) or ""):
                fresh = [p for p in paragraphs if len(p) < _MIN_REPETITION or p not in seen]
                seen.update(fresh)
                prose = "\n\n".join(fresh)
                if len(prose) >= _MIN_DOCSTRING_LENGTH and not _UNWANTED.search(prose):
                    texts.append(prose)
            if texts:
                relative = path.relative_to(site_packages).as_posix()
                yield Document(relative, "\n\n".join(texts) + "\n")


def docstring_paragraphs(source: str) -> Iterator[list[str]]:
    """Yields each docstring of Python source as its paragraphs, without examples of code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            prose = [p.strip("\n") for p in paragraphs if not _CODE_EXAMPLE.search(p)]
            yield [p for p in prose if p.strip()]


def read_headers(include: Path) -> Iterator[Document]:
    """Yields the C and C++ headers of LLVM and OpenSSL that state the Apache licence."""
    for directory in _HEADER_DIRECTORIES:
        for path in (include / directory).rglob("*.h"):
            text = read_text(path)
            if text is None or _UNWANTED.search(text):
                continue
            top = "\n".join(text.split("\n", _LICENCE_LINES)[:_LICENCE_LINES])
            if any(licence in top for licence in _HEADER_LICENCES):
                yield Document(path.relative_to(include).as_posix(), text)
