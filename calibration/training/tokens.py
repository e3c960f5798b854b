"""From text to token ids: a byte-level tokenizer and its vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from calibration.training.corpus import Document

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # the trainer numbers the special tokens first
VOCABULARY_SIZE = 4096


def train_tokenizer(documents: Iterable[Document]) -> Tokenizer:
    """Byte-level BPE that restores any text exactly; `END_OF_TEXT` gets `END_OF_TEXT_ID`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> torch.Tensor:
    """Token ids of all documents as one int64 vector, `END_OF_TEXT` before each and at the end."""
    ids = [END_OF_TEXT_ID]
    for encoding in tokenizer.encode_batch_fast([document.text for document in documents]):
        ids.extend(encoding.ids)
        ids.append(END_OF_TEXT_ID)
    return torch.tensor(ids)
