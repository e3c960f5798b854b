"""Collects the text of three domains, trains their tokenizer, and writes held-out text.

    python calibration/multidomain/prepare.py -o text

The directory `text` gets corpus.json.xz and tokenizer.json, which train.py reads; heldout/ beside
this script gets up to 400,000 bytes of each domain that no model is trained on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder only

from calibration.multidomain.sources import read_code, read_docs, read_headers
from calibration.text.collect import select, write_text
from calibration.training.corpus import Corpus, Document, merge, split
from calibration.training.tokens import train_tokenizer

HELD_OUT = Path(__file__).resolve().parent / "heldout"
HELD_OUT_BYTES = 400_000
# The demo's share: its held-out source, and the calibration text made from it, stays unseen here.
HELD_OUT_SHARE = 0.06


def write_corpus(path: Path, domains: Mapping[str, Corpus]) -> None:
    """Writes domains as xz-compressed JSON: name to part to pairs of path and text."""
    document = {
        name: {
            part: [[each.path, each.text] for each in documents]
            for part, documents in (("train", corpus.train), ("held_out", corpus.held_out))
        }
        for name, corpus in domains.items()
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(lzma.compress(json.dumps(document).encode(), preset=2))
    partial.replace(path)


def read_corpus(path: Path) -> dict[str, Corpus]:
    """Reads what `write_corpus` wrote."""
    document = json.loads(lzma.decompress(path.read_bytes()))
    return {
        name: Corpus(
            *(tuple(Document(*each) for each in parts[part]) for part in ("train", "held_out"))
        )
        for name, parts in document.items()
    }


def main() -> None:
    """Writes corpus, tokenizer and held-out text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="directory of corpus and tokenizer")
    add("--held-out", type=Path, default=HELD_OUT, help="directory of the held-out text")
    add("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    add("--site-packages", type=Path, default=Path(sysconfig.get_path("purelib")))
    add("--include", type=Path, default=Path("/usr/include"), help="directory of C headers")
    arguments = parser.parse_args()
    sources = {
        "code": read_code(arguments.stdlib),
        "docs": read_docs(arguments.site_packages),
        "headers": read_headers(arguments.include),
    }
    domains = {name: split(documents, HELD_OUT_SHARE) for name, documents in sources.items()}
    for name, corpus in domains.items():
        if not corpus.train or not corpus.held_out:
            parser.error(f"no text for the domain {name}; see README.md for what it is made of")
    for directory in (arguments.output, arguments.held_out):
        directory.mkdir(parents=True, exist_ok=True)
    for name, corpus in domains.items():
        text = select(((each.path, each.text) for each in corpus.held_out), HELD_OUT_BYTES)
        write_text(arguments.held_out / f"{name}.txt", text)
        size = sum(len(each.text.encode()) for each in corpus.train)
        print(
            f"{name}: {len(corpus.train)} files, {size} bytes to train on; "
            f"{len(corpus.held_out)} files held out; digest {corpus.digest}"
        )
    write_corpus(arguments.output / "corpus.json.xz", domains)
    tokenizer = train_tokenizer(merge(domains.values()).train)
    tokenizer.save(str(arguments.output / "tokenizer.json"))


if __name__ == "__main__":
    main()
