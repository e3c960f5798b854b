"""Collects the calibration text: code.txt and docs.txt, the same bytes for the same library.

    python calibration/text/collect.py

code.txt holds source files that the demo checkpoint was not trained on, as its training.json lists
them; docs.txt holds topics of the language reference, which no training run reads.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAINING = HERE.parent / "demo" / "checkpoint" / "training.json"
CODE_BYTES = 500_000
DOCS_BYTES = 300_000
# One long file would set the style of the whole text.
MAX_DOCUMENT_BYTES = 64_000
# Names of package registries and of machines' own directories do not belong in shipped text.
UNWANTED = re.compile(r"pypi|pythonhosted|npm|debian|registry|/(?:work|root)\b", re.IGNORECASE)


def select(documents: Iterable[tuple[str, str]], limit: int) -> str:
    """Joins whole documents, in an order that depends on their names alone, up to `limit` bytes.

    Args:
        documents: Pairs of name and text.
        limit: Largest size of the result in UTF-8 bytes.

    Returns:
        The documents without those that are too long or hold `UNWANTED` words, a blank line
        between two, LF at the end of each.
    """
    chosen: list[str] = []
    size = 0
    for _, text in sorted(documents, key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        document = "\n".join(text.splitlines()).strip("\n") + "\n"
        length = len(document.encode()) + 1
        if length > min(MAX_DOCUMENT_BYTES, limit - size) or UNWANTED.search(document):
            continue
        chosen.append(document)
        size += length
    return "\n".join(chosen)


def read_held_out(stdlib: Path, training: Path) -> list[tuple[str, str]]:
    """Path and text of each held-out file that this library has."""
    paths: list[str] = json.loads(training.read_text(encoding="utf-8"))["text"]["held_out_files"]
    return [
        (path, (stdlib / path).read_text(encoding="utf-8"))
        for path in paths
        if (stdlib / path).is_file()
    ]


def read_topics(stdlib: Path) -> list[tuple[str, str]]:
    """Name and text of each topic in pydoc_data/topics.py, read without running it."""
    source = (stdlib / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return list(topics.items())
    raise SystemExit(f"{stdlib}: pydoc_data/topics.py assigns no topics")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with LF line ends, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(text.encode())
    partial.replace(path)


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=HERE, help="directory to write to")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--training", type=Path, default=TRAINING, help="the training.json")
    arguments = parser.parse_args()
    code = select(read_held_out(arguments.stdlib, arguments.training), CODE_BYTES)
    docs = select(read_topics(arguments.stdlib), DOCS_BYTES)
    write_text(arguments.output / "code.txt", code)
    write_text(arguments.output / "docs.txt", docs)


if __name__ == "__main__":
    main()
