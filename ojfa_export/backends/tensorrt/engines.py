"""Engines on the GPU: executors and heads of an opened model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.checks import same_for_all
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.choosing import choose_in_parts
from ojfa_export.backends.cuda.device import Device, PinnedArray
from ojfa_export.backends.cuda.mailbox import DeviceHeadOutput, HeadArguments
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.exit_blocks import ExitBlocks
from ojfa_export.backends.passes import Newest, Pass
from ojfa_export.backends.tensorrt.attention import PAGE
from ojfa_export.backends.tensorrt.executor import SIZES, TensorRtExecutor
from ojfa_export.backends.tensorrt.heads import (
    HEAD_ROWS,
    ExitHead,
    FinalHead,
    Head,
)
from ojfa_export.backends.tensorrt.in_flight import InFlight
from ojfa_export.backends.tensorrt.jumps import MlpExitHead, ResidualExitHead
from ojfa_export.backends.tensorrt.memory import Request
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.pass_kinds import pass_kinds
from ojfa_export.backends.tensorrt.replays import Replays
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import CHECK_HEAD, OF_EXITS, block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.check_output import CheckOutput
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.models.spec import ModelSpec


class TensorRtEngines(OpenedModel):
    """An opened model, the passes over it and its heads.

    Args and attributes are those of `OpenedModel`, and:

    Attributes:
        follows: See `backends.backend.Engines`.
        exit_blocks: See there.
        records_steps: See `backends.backend.RecordsSteps`.
        page_tokens: See `backends.backend.PagedCache`.
        cache_element_bytes: See there.
        pass_sizes: See there.
        in_flight: What is on the device of the newest pass.
    """

    follows = True
    exit_blocks: ExitBlocks | None = None
    records_steps = True
    page_tokens = PAGE

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> None:
        super().__init__(device, spec, weights, engines, rotary, files)
        self.cache_element_bytes = self.cache_dtype.itemsize
        self.pass_sizes = tuple(size for size in SIZES if size <= self.most_pass_tokens())
        self.in_flight = InFlight(self)
        self._replays = Replays(self, self, self.in_flight)
        self._heads: dict[tuple[str, int], Head] = {}  # by graph, and by exit where that matters
        self._states = self.arrays.lasting((HEAD_ROWS, spec.hidden_size), np.float32)
        self._logits = self.arrays.lasting((HEAD_ROWS, spec.vocab_size), np.float32)
        self._pinned = PinnedArray((HEAD_ROWS, spec.vocab_size), np.float32)

    @property
    def has_check_head(self) -> bool:
        """See `backends.checks.ChecksExits`."""
        return CHECK_HEAD in self._plans

    def load_blocks(self, depth: int) -> None:
        """Uploads the weights of the embedding and the first blocks."""
        self.check_room(Request(range(depth)))
        for name in ("embed", *map(block_name, range(depth))):
            self.weights(name)

    def unload_heads(self) -> None:
        """Lets go of the heads' weights; they are uploaded again when used."""
        self._heads.clear()
        for name in {"exit_head", CHECK_HEAD, "final_head"} & self._plans.keys():
            self.close(name)

    def executor(self, slots: int, capacity: int, pages: int | None = None) -> TensorRtExecutor:
        """Makes a KV cache; a block's part of it takes memory when it is first used."""
        return TensorRtExecutor(self, self.in_flight, slots, capacity, pages)

    def pass_kinds(self, sequences: int, length: int) -> Iterable[list[int]]:
        """See `backends.backend.PagedCache`."""
        return pass_kinds(self.pass_sizes, sequences, length)

    def logits(self, hidden: Float32 | DeviceArray, blocks_run: int) -> Float32:
        """Applies the head after so many blocks: [rows, H] to [rows, V]."""
        return self._logits_by(self._head_after(blocks_run), hidden, blocks_run)

    def check_logits(
        self, hidden: Float32 | DeviceArray, blocks_run: int | Sequence[int]
    ) -> Float32:
        """See `backends.checks.ChecksExits`; all rows after as many blocks."""
        return self._logits_by(CHECK_HEAD, hidden, same_for_all(blocks_run))

    def check(self, hidden: Float32 | DeviceArray, blocks_run: int | Sequence[int]) -> HeadOutput:
        """See `backends.checks.ChecksExits`; all rows after as many blocks."""
        return self._ask(CHECK_HEAD, hidden, same_for_all(blocks_run), HeadRequest())

    def _logits_by(self, name: str, hidden: Float32 | DeviceArray, blocks_run: int) -> Float32:
        """Logits [rows, tokens of the head] of a head, by the name of its graph."""
        self.device.make_current()
        states = self.arrays.asarray(hidden)
        head = self._head(name, blocks_run)
        if self.in_flight.may_be_off:
            self.in_flight.call_off()
        result = np.empty((len(states), head.chooser.tokens), np.float32)
        for at in range(0, len(states), HEAD_ROWS):
            part = states if len(states) <= HEAD_ROWS else states[at : at + HEAD_ROWS]
            some = result[at : at + HEAD_ROWS]
            part, logits = self._in_place(part), self._logits_room(head, len(part))

            def work(
                part: DeviceArray = part, logits: DeviceArray = logits, size: int = some.nbytes
            ) -> None:
                head.run(part, logits)
                self.device.download(logits.pointer, self._pinned.pointer, size)

            self.device.recorder.add(
                ("logits", self.mailbox, name, blocks_run, len(part), part.pointer), work
            )
            self.device.synchronize()
            some[...] = self._pinned.array.reshape(-1)[: some.size].reshape(some.shape)
        return result

    def choose(
        self, hidden: Float32 | DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """Applies the head after so many blocks, and chooses on the device."""
        if request.check is None or not self.has_check_head:
            return self._ask(self._head_after(blocks_run), hidden, blocks_run, request)
        states = self._on_device(hidden)
        said = self._ask(CHECK_HEAD, states, blocks_run, HeadRequest(check=request.check))
        return self.of_check(said, states, blocks_run, request)

    def of_check(
        self, said: HeadOutput, states: DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """What a head said, or where that was the check head, also the whole head when it is asked.

        Args:
            said: By whichever head `choose` asks.
            states: [rows, H], which it was asked about.
            blocks_run: Of all rows.
            request: As of `choose`.
        """
        if request.check is None or not self.has_check_head:
            return said

        def whole(some: DeviceArray, asked: HeadRequest) -> HeadOutput:
            return self.choose(some, blocks_run, asked)

        return CheckOutput(said, states, request, whole)

    def _ask(
        self, name: str, hidden: Float32 | DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """Applies a head by the name of its graph, and chooses on the device."""
        states = self._on_device(hidden)
        if self.in_flight.may_be_off:
            self.in_flight.call_off()
        return choose_in_parts(partial(self._choose, name, blocks_run), states, request)

    def _on_device(self, hidden: Float32 | DeviceArray) -> DeviceArray:
        if not self.device.recorder.pending:  # else this thread has just run blocks
            self.device.make_current()
        return self.arrays.asarray(hidden)

    def prepare(
        self,
        executor: Executor,
        step: Pass,
        states: DeviceArray | None,
        newest: Newest,
        request: HeadRequest,
    ) -> Callable[[], HeadOutput]:
        """Gets ready to run a pass and ask the head there; see `backends.backend.Engines`."""
        assert isinstance(executor, TensorRtExecutor)
        self.device.make_current()
        return self._replays.prepare(executor, step, states, newest, request)

    def _choose(
        self, name: str, blocks_run: int, states: DeviceArray, request: HeadRequest
    ) -> DeviceHeadOutput:
        head, count = self._head(name, blocks_run), states.shape[0]
        logits, states = self._logits_room(head, count), self._in_place(states)
        last, check = self.in_flight.last_pass, request.check
        if last is None or not last.executor.can_begin(last):
            check = None
        recorder, (key, keeping) = self.device.recorder, self.in_flight.keeping
        if keeping is not None and not (keeping.keeps(states) and recorder.take_back(key)):
            key, keeping = (), None
        self.in_flight.keeping = (), None

        def work() -> None:
            head.choose(states, logits, asked, keeping)

        asked = HeadArguments.of(replace(request, check=check))
        key = ("choose", self.mailbox, name, blocks_run, count, states.pointer, asked, *key)
        if check is None or last is None:
            recorder.add(key, work)
        else:
            then, ahead = last.executor.begin(last, check.then)
            both = self.device.beside if head.is_small else _one_after_the_other
            recorder.add((*key, *then), lambda: both(work, ahead))
        self.mailbox.leave(request)
        recorder.flush()
        return self.mailbox.expect(count)

    def _in_place(self, states: DeviceArray) -> DeviceArray:
        """Hidden states where they always lie, as recordings refer to them."""
        last = self.in_flight.last_pass
        if last is not None and last.gives(states):
            return states
        self.in_flight.last_pass = None
        if states.lasts:
            return states
        target = self._states[: len(states)]
        self.device.copy(states.pointer, target.pointer, states.nbytes)
        return target

    def _logits_room(self, head: Head, rows: int) -> DeviceArray:
        """Room for a head's logits of some rows: the first numbers of what all heads share."""
        return self._logits.reshape(rows, head.chooser.tokens)

    def _head_after(self, blocks_run: int) -> str:
        """The graph of the head after so many blocks; behind exits' blocks it is the model's."""
        own = blocks_run == self.spec.blocks or self.exit_blocks is not None
        return "final_head" if own else "exit_head"

    def _head(self, name: str, blocks_run: int) -> Head:
        same = OF_EXITS.isdisjoint(self.plan(name).weights)  # at every exit
        key = name, 0 if same else blocks_run
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._open_head(name, blocks_run)
        return head

    def _open_head(self, name: str, blocks_run: int) -> Head:
        weights = self.plan(name).weights
        if "gates" in weights:
            return ResidualExitHead(self, name, blocks_run)
        if "exit.scale" in weights:
            return MlpExitHead(self, name, blocks_run)
        return ExitHead(self, name) if "project" in weights else FinalHead(self, name)


def _one_after_the_other(first: Work, second: Work) -> None:
    first()
    second()
