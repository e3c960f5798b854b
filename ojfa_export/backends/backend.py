"""What a backend is: it builds engines from the portable graphs, and it runs them.

A backend is one folder beside this file, and the only place that imports its SDK. Its package
exports a `Backend` as BACKEND (see `backends.load`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.families.spec import ModelSpec, Precision

if TYPE_CHECKING:
    from ojfa_export.backends.choice import Choices, Choosing, OneToken

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


# Hidden states, [rows, tokens, H] or part of it: an array of NumPy's, or one in the memory of a
# device with as much of its interface as a session uses (`Cache.arrays` makes them).
Hidden = Any
# Token ids [rows, tokens] int32 of NumPy; where `Engines.follows`, also choices of one token a row.
Tokens = Any


def keep(kept: Hidden, rows: slice, starts: Sequence[int], hidden: Hidden) -> None:
    """`Cache.keep` for arrays like NumPy's."""
    for row, start, states in zip(range(rows.start, rows.stop), starts, hidden, strict=True):
        kept[row, start : start + len(states)] = states


class Cache(Protocol):
    """The keys and values of one session's sequences, and the buffers of its decode steps.

    Made by `Engines.new_cache`; rows are positions, so that dropping tokens is a matter of the
    session's watermarks alone.

    Attributes:
        arrays: NumPy, or a namespace like it for hidden states elsewhere: `empty`, `stack`,
            `concatenate`, `ascontiguousarray`.
    """

    arrays: Any

    def embed(self, token_ids: Tokens, starts: Sequence[int]) -> Hidden:
        """Embeds tokens [rows, tokens] from these positions on: [rows, tokens, H]."""
        ...

    def run_blocks(
        self,
        blocks: range,
        hidden: Hidden,
        rows: slice,
        starts: Sequence[int],
        *,
        long_context: bool,
    ) -> Hidden:
        """Runs consecutive blocks on new tokens, each appending its keys and values.

        Args:
            blocks: Which blocks, from 0.
            hidden: [rows, tokens, H], of NumPy or of `arrays`; several rows only with one token
                each.
            rows: Which sequences.
            starts: Position of each sequence's first token here; cache rows from there on are
                overwritten.
            long_context: Whether LongRoPE's long factors apply.

        Returns:
            [rows, tokens, H] after the last of the blocks; valid until the next call.
        """
        ...

    def keep(self, kept: Hidden, rows: slice, starts: Sequence[int], hidden: Hidden) -> None:
        """Copies hidden states [rows, tokens, H] to `kept` [sequences, positions, H].

        Args:
            kept: Made by `arrays`.
            rows: Which sequences.
            starts: Position of each sequence's first token.
            hidden: What `run_blocks` gave.
        """
        ...

    def unload(self, block: int) -> None:
        """Closes a block's engine; its keys and values stay, and it is opened again when used."""
        ...


class Engines(Protocol):
    """An opened model. Blocks are loaded when first used, or by `load_blocks`.

    Attributes:
        follows: Whether `Cache.embed` takes choices in place of token ids, before they are known.
    """

    follows: bool

    def load_blocks(self, depth: int) -> None:
        """Loads the first blocks."""
        ...

    def new_cache(self, batch_size: int, capacity: int) -> Cache:
        """Makes a cache for this many sequences of at most this many tokens."""
        ...

    def logits(self, hidden: Hidden, blocks_run: int) -> Float32:
        """Applies a head to the output of so many blocks: [rows, H] to NumPy's [rows, V].

        After all blocks this is the model's own head, otherwise the exit head. An exit head with a
        gate for each exit has an input `blocks_run`, [rows] int32, beside `hidden`.
        """
        ...

    def choose(self, hidden: Hidden, blocks_run: int, how: Choosing) -> Choices:
        """Applies a head as `logits` does, and chooses a token for each row of [rows, H].

        Engines whose logits are on the host inherit this from `backends.choice.ChoosesOnHost`.
        """
        ...

    def prepare(
        self, cache: Cache, one: OneToken, depth: int, kept: Hidden | None, how: Choosing
    ) -> Callable[[], Choices]:
        """Gets ready to run tokens on to a depth, keep what comes out, and ask the head there.

        That is what `Cache.embed`, `run_blocks` and `keep` and `choose` do one after the other
        (`backends.choice.run_on`); engines may know a shorter way. Nothing else may be asked of
        the engines before it is run, or it must not be run.

        Args:
            cache: Of the tokens' sequences.
            one: The tokens; knows them at the new depth afterwards.
            depth: Blocks to have run.
            kept: As of `Cache.keep`; None to keep nothing.
            how: As of `choose`.
        """
        ...

    def unload_heads(self) -> None:
        """Closes both heads; they are opened again when used."""
        ...


class Backend(Protocol):
    """A backend: what a package in backends/ exports as BACKEND.

    Attributes:
        name: As in --backend.
        suffix: Of the file that a graph's engine is opened by.
    """

    name: str
    suffix: str

    def versions(self) -> dict[str, str]:
        """What the engines depend on, recorded with them."""
        ...

    def check(self, built_with: Mapping[str, str]) -> None:
        """Says whether engines can be opened here, before any is.

        Args:
            built_with: What `versions` gave when they were built.

        Raises:
            BackendError: They were built for something else.
        """
        ...

    def build_engine(self, spec: ModelSpec, graph: Path, engine: Path) -> None:
        """Builds the engine of one portable graph; other files may come beside it.

        Raises:
            BackendError: The backend can't run this graph.
        """
        ...

    def open_engines(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> Engines:
        """Opens built engines.

        Args:
            spec: The model.
            weights: Directory of the weight files.
            engines: Engine files by graph name.
            rotary: Cosines and sines [rows, rotary_dim/2], or None.
            files: Opens every one of these files, now and later.
        """
        ...


@runtime_checkable
class SharesEngines(Protocol):
    """A backend with engines that several graphs share, and that take long to build."""

    def engine_names(self, spec: ModelSpec, graph: Path) -> list[str]:
        """The engines that a graph needs; what two graphs share has the same name for both."""
        ...


@runtime_checkable
class ShowsLayers(Protocol):
    """A backend whose compiler can be asked what it made of a graph."""

    def describe_layers(self, engines: Mapping[str, Path]) -> dict[str, str]:
        """Layers of every engine file, for people.

        Args:
            engines: As `open_engines` takes them; digests have been checked.

        Raises:
            BackendError: They can't be looked at here.
        """
        ...


@runtime_checkable
class Tracing(Protocol):
    """A backend that shows what is inside a block, so that verification can name a tensor."""

    def trace_block(self, engines: Engines, block: int, hidden: Float32) -> dict[str, Float32]:
        """Runs a block on one whole sequence, as a prompt.

        Args:
            engines: What `open_engines` gave.
            block: Which block, from 0; loaded for this and let go of.
            hidden: [tokens, H].

        Returns:
            Some of the tensors of `verify.exact.ExactModel.block`, [tokens, features], in order.
        """
        ...


@runtime_checkable
class Accelerated(Protocol):
    """A backend whose weights lie in the memory of a device: what measurements compare with."""

    def device(self) -> dict[str, str]:
        """What the device is, and the versions that matter for speed."""
        ...

    def copy_bandwidth(self) -> float:
        """Bytes per second that a copy within the device reads and writes, measured."""
        ...

    def weight_bytes(self, precision: Precision) -> int:
        """Of one number of a matrix of weights, as it lies in the device's memory."""
        ...
