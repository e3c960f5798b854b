"""A head over frequent tokens, for a draft layer that comes without a head of its own.

A draft then reads these rows of the model's own head instead of all. Other tokens are never
drafted, which costs drafts and no token: the model checks them all.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ojfa_export.bundle.draft_shortcut import DraftShortcut
from ojfa_export.compiler.check_stage import count_tokens, frequent
from ojfa_export.compiler.inputs import Inputs
from ojfa_export.decoding.arrays import Int32
from ojfa_export.graphs.export import Exporter

# Where nothing is asked: so many tokens, of a vocabulary that is several times as large, and where
# the model's head is at least as much as all the rest that a draft reads.
DEFAULT_TOKENS = 8192
LEAST_VOCABULARY = 4 * DEFAULT_TOKENS
# A tokenizer that was made by merging numbers its tokens by how frequent they were in its text. So
# a number says how frequent a token may be, by Zipf's law from some rank on, where the counted text
# lacks it.
ZIPF_OFFSET = 100


def draft_vocabulary(inputs: Inputs) -> int:
    """Tokens of the head that the draft layer gets; 0 for none but what it has."""
    draft, asked = inputs.given.draft, inputs.settings.draft_vocabulary
    if draft is None or draft.head is not None:
        return 0
    if asked is not None:
        return asked
    spec = inputs.checkpoint.spec
    is_large = spec.vocab_size >= LEAST_VOCABULARY
    is_most = spec.vocab_size * spec.hidden_size >= draft.parameters
    return DEFAULT_TOKENS if is_large and is_most else 0


def with_frequent_head(draft: DraftShortcut, inputs: Inputs, exporter: Exporter) -> DraftShortcut:
    """The layer, with rows of the model's head where it gets some; that must be exported."""
    size = draft_vocabulary(inputs)
    if not size:
        return draft
    tokens = frequent_tokens(inputs, size)
    return replace(draft, head=exporter.head_rows(tokens), tokens=tokens)


def frequent_tokens(inputs: Inputs, size: int) -> Int32:
    """Ids [size], rising, of the likeliest tokens by the calibration text and by their numbers."""
    spec = inputs.checkpoint.spec
    counted = count_tokens(inputs, None)
    numbered = 1 / (np.arange(spec.vocab_size) + ZIPF_OFFSET)
    shares = counted / counted.sum() + numbered / numbered.sum()
    return frequent(shares, spec.eos_token_ids, size)
