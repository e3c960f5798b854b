"""Token ids of real text to compare on."""

from __future__ import annotations

import numpy as np

from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import BundleError
from ojfa_export.models.calibration_text import read_text, shipped_text
from ojfa_export.models.tokenizer import encode
from ojfa_export.runtime.model import Model


def sample_token_ids(model: Model, tokens: int) -> Int32:
    """The beginnings of the texts that ship, [texts, tokens] int32.

    Args:
        model: Its tokenizer and cache decide ids and length.
        tokens: Of each text; fewer where the cache holds fewer.

    Raises:
        BundleError: The tokenizer makes too few of any text.
    """
    length = min(tokens, model.manifest.cache.max_length)
    rows = [
        encode(model.tokenizer, read_text(path).documents[0][: 20 * length])[:length]
        for path in shipped_text()
    ]
    whole = [row for row in rows if len(row) == length]
    if not whole:
        raise BundleError(
            f"the tokenizer of {model.bundle.directory} makes fewer than {length} tokens of text",
            hint="don't use this bundle: build it again",
        )
    return np.array(whole, np.int32)
