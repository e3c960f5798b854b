"""What a backend that runs draft layers implements; what one computes: `bundle.draft_shortcut`.

A round of drafting, as `runtime.drafter` asks for it. While the model runs a sequence's tokens,
`keep` is given their hidden states after each of the layer's depths. `begin` runs the layer on the
positions that are new to it since, whose next tokens are known by then, and gives what it says
after the newest; a head turns that into a token. `go_on` runs it one position further, on its own
output and that token, as often as wanted. The next round's `begin` writes over what `go_on` left.

Hidden states stay wherever the backend has them: nothing here needs them on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Backend, Engines, Executor
from ojfa_export.backends.passes import Chunk, Pass
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.decoding.arrays import Float32, Hidden
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.errors import BackendError
from ojfa_export.models.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class DraftLayer:
    """A bundle's draft layer, to be opened.

    Attributes:
        depths: Blocks run before each of the model's states that it sees.
        spec: The layer, as a model of one block; its vocabulary is that of its head.
        vocab_size: Of the model.
        tokens: Ids [D] int32 of the tokens that its logits are of, rising; None for all.
        weights: Directory of the weight files.
        engines: Engine files by graph name, of `names.DRAFT_GRAPHS`.
        rotary: Cosines and sines [positions, rotary_dim/2].
        files: Opens every one of these files, now and later.
    """

    depths: tuple[int, ...]
    spec: ModelSpec
    vocab_size: int
    tokens: NDArray[np.int32] | None
    weights: Path
    engines: Mapping[str, Path]
    rotary: tuple[Float32, Float32]
    files: Files = UNCHECKED


class DraftExecutor(Protocol):
    """Runs a draft layer for the sequences of one cache, beside the model's executor.

    It has keys and values of its own, a sequence in each slot, and room for the states that it is
    given. Dropping tokens is a matter of the caller's marks alone, as in `Executor`.
    """

    def keep(self, index: int, chunks: Sequence[Chunk], hidden: Hidden) -> None:
        """Copies the model's hidden states after `depths[index]` blocks.

        Args:
            index: Which of the depths.
            chunks: Whose, as of `Executor.run`.
            hidden: [tokens, H], as `Executor.run` gave them.
        """
        ...

    def begin(self, tokens: Sequence[int], chunks: Sequence[Chunk]) -> Hidden:
        """Runs the layer on positions whose states were kept, after all depths.

        Args:
            tokens: Each position's next token, in the order of the chunks.
            chunks: The positions; each slot at most once, and none after its positions before.

        Returns:
            [chunks, H] at the last position of each; the caller's to keep.
        """
        ...

    def go_on(self, hidden: Hidden, tokens: Sequence[int], chunks: Sequence[Chunk]) -> Hidden:
        """Runs the layer on one more position of each sequence.

        Args:
            hidden: [chunks, H] at the position before, as `begin` or `go_on` gave it.
            tokens: Each position's next token.
            chunks: The positions, of length 1.

        Returns:
            [chunks, H]; the caller's to keep.
        """
        ...

    def release(self, slot: int) -> None:
        """Gives memory of a slot back whose sequence has ended."""
        ...

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies what is known of a slot's first positions to another: states, keys and values."""
        ...


class Drafts(Protocol):
    """Drafts of some rows, the same number of each. On a device they may be on their way.

    Attributes:
        count: Of each row.
    """

    @property
    def count(self) -> int:
        """As above."""
        ...

    def drafts(self) -> list[list[int]]:
        """Each row's drafts; waits for them."""
        ...

    def tokens(self) -> list[int]:
        """The same with the token before each row's first, row by row, as a pass takes them."""
        ...


@runtime_checkable
class Chains(Protocol):
    """A `DraftExecutor` whose drafts need not be on the host before they are drafted from."""

    def chain(self, tokens: Sequence[int], chunks: Sequence[Chunk], count: int) -> Drafts | None:
        """Drafts what is likeliest: `begin`, then `go_on` from each draft but the last.

        Args:
            tokens: As of `begin`.
            chunks: As of `begin`; there is room for the drafts.
            count: Drafts of each at most, 1 or more.

        Returns:
            None of more rows than drafts can be made for at once.
        """
        ...

    def check(self, executor: Executor, step: Pass) -> HeadOutput | None:
        """Runs a pass through all blocks, keeps the states, and asks the final head.

        Args:
            executor: Of the model.
            step: All of sequences that draft; `Pass.tokens` may be what `chain` gave.

        Returns:
            What is likeliest after each token; None where the pass must be run by its parts.
        """
        ...


class DraftEngines(Protocol):
    """An opened draft layer and its head. `blocks_run` is 0 throughout.

    Attributes:
        depths: Blocks run before each of the model's states that it sees.
        token_bytes: That a token takes: keys and values, and the states.
        takes_whole: Whether a cache takes all of its memory when it is first used; else tokens
            take theirs as they are written.
    """

    depths: tuple[int, ...]
    token_bytes: int
    takes_whole: bool

    def executor(self, slots: int, capacity: int) -> DraftExecutor:
        """Makes a cache for this many sequences of at most this many tokens."""
        ...

    def logits(self, hidden: Hidden, blocks_run: int) -> Float32:
        """Applies the head: [rows, H] to NumPy's [rows, V], -inf for tokens that it never drafts.

        The tokens are the model's.
        """
        ...

    def choose(self, hidden: Hidden, blocks_run: int, request: HeadRequest) -> HeadOutput:
        """Applies the head as `logits` does, and chooses a token of the model for each row."""
        ...


@runtime_checkable
class RunsDrafts(Protocol):
    """A backend that runs draft layers: `Backend.build_engine` takes `names.DRAFT_GRAPHS` as well.

    The spec that it is given for them is the layer's.
    """

    def open_draft(self, engines: Engines, layer: DraftLayer) -> DraftEngines:
        """Opens a bundle's draft layer.

        Args:
            engines: Of the model, as `Backend.open_engines` gave them.
            layer: The layer.
        """
        ...


def token_bytes(layer: DraftLayer, element_bytes: int) -> int:
    """Of a token's keys and values, of so many bytes a number, and of its states in fp32."""
    spec = layer.spec
    kept = 2 * spec.kv_heads * spec.head_dim * element_bytes
    return kept + 4 * len(layer.depths) * spec.hidden_size


def no_drafts(backend: Backend) -> BackendError:
    """What to tell of a backend that doesn't run draft layers."""
    return BackendError(
        f"the backend {backend.name} does not run draft layers yet",
        hint="leave --speculate out, draft at an exit from 1 on, or use --backend onnxruntime or "
        "tensorrt",
    )
