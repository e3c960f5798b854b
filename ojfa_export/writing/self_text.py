"""Text that the model writes itself: what it will meet when it generates.

Half of the windows begin with the chat template's text up to where the user's turn would begin, so
that the model makes up question and answer (Xu et al., "Magpie", arXiv 2406.08464); the others go
on from some tokens at random places of a given text.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ojfa_export.decoding.arrays import Int32
from ojfa_export.errors import CalibrationError, CheckpointError
from ojfa_export.models.checkpoint.quiet import quiet_transformers
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.progress import Progress
from ojfa_export.writing.cache import empty_cache
from ojfa_export.writing.frozen import Frozen

TEMPERATURE, TOP_P = 0.9, 0.95
START_TOKENS = 24
# Windows that are written together: on the CPU; on a GPU at most, and of its memory at most. A
# GPU takes little longer for many than for few.
CPU_ROWS, GPU_ROWS, GPU_SHARE = 32, 4096, 0.5
# Not cuDNN's, which makes a plan anew for each length of the cache.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_MARK = "the user's words begin here"


@dataclass(frozen=True)
class Starts:
    """How windows begin.

    Attributes:
        chat: The template's text up to the user's turn, as token ids; empty without a template.
        ids: Token ids of the text from which the others begin.
        names: Of its sources.
    """

    chat: tuple[int, ...]
    ids: Int32
    names: tuple[str, ...]

    @property
    def given(self) -> int:
        """First tokens of a window that the model didn't write, at most."""
        return max(START_TOKENS, len(self.chat))

    def about(self, tokens: int) -> str:
        """What the text is, for people."""
        places = f"{START_TOKENS} tokens of {', '.join(self.names)}"
        how = f"half from its chat template, half from {places}" if self.chat else f"from {places}"
        return (
            f"{tokens:,} tokens that the model wrote, {how}, at temperature {TEMPERATURE} and "
            f"top-p {TOP_P}"
        )


@dataclass(frozen=True, eq=False)
class Written:
    """Text that the model wrote.

    Attributes:
        windows: [n, T] int32 token ids.
        parts: How many of them are of each batch, in order; n in all.
        given: First tokens of each window that it didn't write, at most.
        about: What the text is, for people.
    """

    windows: Int32
    parts: tuple[int, ...]
    given: int
    about: str


def find_starts(
    directory: Path,
    tokenizer: Tokenizer,
    names: Sequence[str],
    sources: Sequence[Int32],
    length: int,
    option: str,
) -> Starts:
    """How windows of this model begin.

    Args:
        directory: The checkpoint.
        tokenizer: Its tokenizer.
        names: Of the text's sources.
        sources: Their token ids.
        length: Tokens of a window.
        option: That gives more text.

    Raises:
        CalibrationError: Less text than one start needs, or windows that a start would fill.
        CheckpointError: A chat template that can't be rendered.
    """
    ids = np.concatenate(list(sources))
    if ids.size <= START_TOKENS or length <= 2 * START_TOKENS:
        raise CalibrationError(
            f"the text has {ids.size} tokens and windows have {length}; what the model writes "
            f"begins with {START_TOKENS}",
            hint=f"give more {option} to begin from",
        )
    chat = chat_start(directory)
    chat_ids = tuple(tokenizer.encode(chat, add_special_tokens=False).ids) if chat else ()
    if 2 * len(chat_ids) > length:
        raise CheckpointError(
            f"the chat template of {directory} begins with {len(chat_ids)} tokens, more than half "
            f"of a window of {length}",
            hint="leave --self-text out",
        )
    return Starts(chat_ids, ids, tuple(names))


def chat_start(directory: Path) -> str:
    """The chat template's text up to the user's words; empty where there is no template.

    Raises:
        CheckpointError: It can't be rendered, or loses the user's words.
    """
    from transformers import AutoTokenizer

    hint = "repair it, or leave --self-text out"
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(os.fspath(directory), local_files_only=True)
            if not tokenizer.chat_template:
                return ""
            message = [{"role": "user", "content": _MARK}]
            text: str = tokenizer.apply_chat_template(message, tokenize=False)
    except Exception as error:  # whatever a template, which is a program, does
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the chat template of {directory} can't be rendered: {reason}", hint
        ) from error
    start, found, _ = text.partition(_MARK)
    if not found:
        raise CheckpointError(f"the chat template of {directory} loses the user's words", hint)
    return start


def write(
    frozen: Frozen,
    starts: Starts,
    length: int,
    tokens: int,
    seed: int,
    directory: Path,
    progress: Progress,
) -> Written:
    """Lets the model write, batch by batch; those that are in the directory are not written again.

    Args:
        frozen: The model.
        starts: How windows begin.
        length: Tokens of a window.
        tokens: Wanted in all.
        seed: Of all that is random.
        directory: Where batches are kept as files of token ids.
        progress: Shows tokens.

    Raises:
        CheckpointError: The model's logits are NaN or infinite.
        OSError: A batch can't be written.
    """
    windows = -(-tokens // length)
    directory.mkdir(exist_ok=True)
    batches = [np.load(path) for path in _kept(directory)]
    done = sum(map(len, batches))
    turns = -(-windows // (2 * rows_at_once(frozen, length)))
    rows = -(-windows // (2 * turns))  # chat and text have as many turns, of as many windows
    with progress.task("writing text", max(0, windows - done) * length, "tokens") as task:
        while done < windows:
            number = len(batches)
            start = _start(starts, min(rows, windows - done), number, seed)
            generator = torch.Generator(frozen.device).manual_seed(_seed(seed, number))
            written = generate(frozen, start, length, generator, task.advance)
            buffer = io.BytesIO()
            np.save(buffer, written)
            write_atomically(directory / f"{number:06}.npy", buffer.getvalue())
            batches.append(written)
            done += len(written)
    ids = np.concatenate(batches)
    parts = tuple(map(len, batches))
    return Written(ids, parts, starts.given, starts.about(ids.size))


def rows_at_once(frozen: Frozen, length: int) -> int:
    """Windows that are written together."""
    spec, memory = frozen.spec, frozen.memory_left
    if memory is None:
        return CPU_ROWS
    cache = 2 * 2 * spec.blocks * spec.kv_heads * spec.head_dim * length
    # Drawing takes some six arrays of the vocabulary's size in fp32.
    return max(1, min(GPU_ROWS, int(GPU_SHARE * memory / (cache + 24 * spec.vocab_size))))


@torch.no_grad()
def generate(
    frozen: Frozen,
    start: Int32,
    length: int,
    generator: torch.Generator,
    tell: Callable[[int], None] = lambda tokens: None,
) -> Int32:
    """Goes on from [rows, s] token ids up to `length`; an end of text doesn't end it.

    Returns:
        [rows, length].
    """
    ids = torch.from_numpy(start.astype(np.int64)).to(frozen.device)
    cache = empty_cache(frozen.model.config, length)
    newest, parts = ids, [ids]
    finite = torch.ones((), dtype=torch.bool, device=frozen.device)
    for place in range(ids.shape[1], length):
        with sdpa_kernel(_ATTENTION):
            out = frozen.model.base_model(input_ids=newest, past_key_values=cache, use_cache=True)
        newest, likely = sample(frozen.full_logits(out.last_hidden_state[:, -1]), generator)
        finite &= likely.isfinite().all()
        parts.append(newest)
        tell(len(ids) * (1 if place > ids.shape[1] else 1 + ids.shape[1]))
    frozen.check_finite(finite)
    return torch.cat(parts, 1).cpu().numpy().astype(np.int32)


def sample(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a token of each row of logits [rows, V]: temperature, then top-p.

    Top-p (Holtzman et al., arXiv 1904.09751) keeps the likeliest tokens, as few as have that
    probability together, and those as likely as the last of them. A token is kept where all
    likelier ones together have less, which is known without sorting: one that isn't kept, as one
    in twenty at most, is drawn again.

    Returns:
        [rows, 1] int64 tokens, and [rows, 1] fp32 their probabilities before top-p: no numbers
        where logits are none.
    """
    probabilities = (logits.float() / TEMPERATURE).softmax(-1)
    tokens, likely, dropped = _draw(probabilities, generator)
    while (left := dropped.nonzero()[:, 0]).numel():
        tokens[left], likely[left], dropped[left] = _draw(probabilities[left], generator)
    return tokens, likely


def _draw(probabilities: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens drawn [rows, 1], their probabilities [rows, 1], and which top-p drops [rows].

    As torch.multinomial does it, which checks its input at the cost of a draw: of waiting times
    with these rates the shortest is each one's with its probability.
    """
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    tokens = torch.div(probabilities, waits, out=waits).argmax(-1, keepdim=True)
    likely = probabilities.gather(-1, tokens)
    likelier = torch.where(probabilities > likely, probabilities, 0).sum(-1)
    return tokens, likely, likelier >= TOP_P


def _start(starts: Starts, rows: int, number: int, seed: int) -> Int32:
    """First tokens [rows, s] of a batch: chat and text take turns."""
    if starts.chat and number % 2 == 0:
        return np.tile(np.array(starts.chat, np.int32), (rows, 1))
    places = np.random.default_rng([seed, number]).integers(
        starts.ids.size - START_TOKENS, size=rows
    )
    return np.stack([starts.ids[place : place + START_TOKENS] for place in places])


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)


def _kept(directory: Path) -> list[Path]:
    """Batches from the first on, without a gap."""
    found: list[Path] = []
    while (path := directory / f"{len(found):06}.npy").exists():
        found.append(path)
    return found
