"""What a backend is: it builds engines from the portable graphs, and it runs them.

A backend is one folder beside this file, and the only place that imports its SDK. Its package
exports a `Backend` as BACKEND (see `backends.load`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ojfa_export.backends.exit_blocks import ExitBlocks
from ojfa_export.backends.passes import Chunk, Newest, Pass
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.decoding.arrays import Float32, Hidden, Tokens
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.models.precision import Precision
from ojfa_export.models.spec import ModelSpec


class Executor(Protocol):
    """Runs passes for the sequences of one KV cache, which holds a sequence in each slot.

    Made by `Engines.executor`. Dropping tokens of a sequence is a matter of its watermarks alone:
    cache rows from the first position of a chunk on are overwritten.

    Attributes:
        arrays: NumPy, or a namespace like it for hidden states elsewhere: `empty`, `concatenate`,
            `ascontiguousarray`.
    """

    arrays: Any

    def embed(self, tokens: Tokens, chunks: Sequence[Chunk]) -> Hidden:
        """Embeds the tokens of chunks: [tokens, H].

        Args:
            tokens: Token ids in the order of the rows; where `Engines.follows`, also the choices
                that they will be, of chunks of one token.
            chunks: Where they are.
        """
        ...

    def run(
        self, blocks: range, hidden: Hidden, chunks: Sequence[Chunk], *, long_context: bool
    ) -> Hidden:
        """Runs consecutive blocks on new tokens, each appending its keys and values.

        Args:
            blocks: Which blocks, from 0.
            hidden: [tokens, H], of NumPy or of `arrays`.
            chunks: Whose tokens they are; each slot at most once.
            long_context: Whether LongRoPE's long factors apply.

        Returns:
            [tokens, H] after the last of the blocks; valid until the next call.
        """
        ...

    def new_states(self) -> Hidden:
        """Room for a hidden state of every position, [slots, capacity, H]; not set to anything."""
        ...

    def store(self, states: Hidden, chunks: Sequence[Chunk], hidden: Hidden) -> None:
        """Copies hidden states [tokens, H], which `run` gave, to their places in `new_states`."""
        ...

    def load(self, states: Hidden, chunks: Sequence[Chunk]) -> Hidden:
        """Hidden states [tokens, H] that `store` copied there."""
        ...

    def unload(self, block: int) -> None:
        """Closes a block's engine; its keys and values stay, and it is opened again when used."""
        ...

    def release(self, slot: int) -> None:
        """Gives memory of a slot back whose sequence has ended."""
        ...

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copies the keys and values of a slot's first tokens to another, in every block."""
        ...


class Engines(Protocol):
    """An opened model. Blocks are loaded when first used, or by `load_blocks`.

    Attributes:
        follows: Whether `Executor.embed` takes choices in place of token ids, before they are
            known.
        exit_blocks: Of a block jump, set by whoever opens one; heads below full depth are then
            asked about what comes out of these, and are the model's own.
    """

    follows: bool
    exit_blocks: ExitBlocks | None

    def load_blocks(self, depth: int) -> None:
        """Loads the first blocks."""
        ...

    def executor(self, slots: int, capacity: int) -> Executor:
        """Makes a KV cache for this many sequences of at most this many tokens, and its passes."""
        ...

    def logits(self, hidden: Hidden, blocks_run: int) -> Float32:
        """Applies a head to the output of so many blocks: [rows, H] to NumPy's [rows, V].

        After all blocks this is the model's own head, otherwise the exit head. An exit head with a
        gate for each exit has an input `blocks_run`, [rows] int32, beside `hidden`.
        """
        ...

    def choose(self, hidden: Hidden, blocks_run: int, request: HeadRequest) -> HeadOutput:
        """Applies a head as `logits` does, and chooses a token for each row of [rows, H].

        Engines whose logits are on the host inherit this from `backends.choice.ChoosesOnHost`.
        """
        ...

    def prepare(
        self,
        executor: Executor,
        step: Pass,
        states: Hidden | None,
        newest: Newest,
        request: HeadRequest,
    ) -> Callable[[], HeadOutput]:
        """Gets ready to run a pass of one token each, keep what comes out, and ask the head there.

        That is what `Executor.embed`, `run` and `store` and `choose` do one after the other
        (`backends.choice.run_and_choose`); engines may know a shorter way. Nothing else may be
        asked of the engines before it is run, or it must not be run.

        Args:
            executor: Of the sequences.
            step: One token of each, from block 0 on, or from where `newest` is.
            states: Where to keep what comes out, as of `Executor.store`; None to keep nothing.
            newest: The newest pass of the executor; knows this one afterwards.
            request: As of `choose`.
        """
        ...

    def unload_heads(self) -> None:
        """Closes the heads; they are opened again when used."""
        ...


@runtime_checkable
class AsksExitsTogether(Protocol):
    """Engines that apply the exit head to the outputs of several exits in one call."""

    def logits_of_exits(self, hidden: Hidden, blocks_run: Sequence[int]) -> Float32:
        """Applies the exit head to rows of hidden states, after `blocks_run[row]` blocks each.

        Args:
            hidden: [rows, H].
            blocks_run: [rows], each fewer than the model has.

        Returns:
            NumPy's [rows, V].
        """
        ...


@runtime_checkable
class RecordsSteps(Protocol):
    """Engines whose executors record their steps, so that one that has run is faster than a new.

    Attributes:
        records_steps: True.
    """

    records_steps: bool


@runtime_checkable
class PagedCache(Protocol):
    """Engines whose executors keep keys and values in pages, so that memory follows tokens.

    Attributes:
        page_tokens: Positions of a page.
        cache_element_bytes: Of a number in the cache.
        pass_sizes: Tokens of the passes with prompts that there are, rising: a pass of another
            number is filled up to the next of them, and takes as long.
    """

    page_tokens: int
    cache_element_bytes: int
    pass_sizes: tuple[int, ...]

    def executor(self, slots: int, capacity: int, pages: int | None = None) -> Executor:
        """As `Engines.executor`, with so many pages for all slots together."""
        ...

    def pass_kinds(self, sequences: int, length: int) -> Iterable[list[int]]:
        """Passes that each run faster when one like them has run twice: lengths of their chunks.

        Args:
            sequences: That may run together.
            length: Tokens of a sequence at most.
        """
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
