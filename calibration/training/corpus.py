"""Training text: documents split by file into a training and a held-out part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and its name, a path relative to its source's root, with slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents, disjoint and each in the order of the paths."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the paths and texts of both parts, as hex digits."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(f"{document.path}\0{document.text}\0".encode())
            digest.update(b"\0")
        return digest.hexdigest()


def split(documents: Iterable[Document], held_out_share: float) -> Corpus:
    """Splits documents by a hash of each path, never by their order or a random state.

    Args:
        documents: The documents; of those with the same text only the first stays.
        held_out_share: Expected share of the documents that is held out, in 0..1.

    Returns:
        The corpus; a document's part depends on its path alone.
    """
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[str] = set()
    for document in sorted(documents, key=lambda document: document.path):
        if document.text in seen:
            continue
        seen.add(document.text)
        part = held_out if _path_fraction(document.path) < held_out_share else train
        part.append(document)
    return Corpus(tuple(train), tuple(held_out))


def merge(corpora: Iterable[Corpus]) -> Corpus:
    """One corpus of several, one after the other."""
    parts = list(corpora)
    return Corpus(
        tuple(document for part in parts for document in part.train),
        tuple(document for part in parts for document in part.held_out),
    )


def _path_fraction(path: str) -> float:
    """A number in [0, 1) that looks random and depends on the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") / 2**32
