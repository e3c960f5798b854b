"""Texts on which tokenizers that are not the same differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ojfa_export.models.calibration_text import read_text, shipped_text

# Characters of real text, where no truncation asks for more.
LONG = 20_000
SPACES = (" ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u3000", "\ufeff")
PLANES = 17
# Code points of a plane: every so many, so that each script of some size has a few.
STRIDE = 251
# Signs that normalizers compose, decompose or replace.
COMPOSED = (
    "e\u0301 \u00e9 \ufb01 \u2460 \u1100\u1161 \uac00 \u0130 \u00df \U0001f468\u200d\U0001f469"
)


def probe_texts(added_tokens: Iterable[str], truncation: int) -> Mapping[str, list[str]]:
    """Texts by what they probe.

    Args:
        added_tokens: Every token that was added to the tokenizer's model.
        truncation: Tokens at which a saved setting would cut a text off; 0 for none.
    """
    tokens = sorted(set(added_tokens))
    around = [each for token in tokens for each in (token, f"a{token}b", f" {token} ", token * 2)]
    runs = [f"a{space * count}b{space}" for space in SPACES for count in (1, 2, 3, 8)]
    real = "".join(read_text(path).documents[0] for path in shipped_text())
    # No token of real text is longer than a line.
    long = real[: max(LONG, 80 * truncation)] or real
    while len(long) < 80 * truncation:
        long += long
    return {
        "added tokens": [*around, " ".join(tokens), "".join(tokens)],
        "white space": ["", *runs, "".join(SPACES), " def main(x):\n\n\n    return x  \n"],
        "a long text": [long],
        "Unicode": [COMPOSED, *map(_plane, range(PLANES))],
    }


def _plane(number: int) -> str:
    points = range(number * 0x10000, (number + 1) * 0x10000, STRIDE)
    characters = [chr(point) for point in points if not 0xD800 <= point <= 0xDFFF]
    return "".join(
        character + (" " if index % 7 == 0 else "") for index, character in enumerate(characters)
    )
