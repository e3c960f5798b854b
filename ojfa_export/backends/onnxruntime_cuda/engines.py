"""Engines of ONNX Runtime's CUDA provider: executors and heads of an opened model.

What ONNX Runtime has no operator for, choosing a token and going on from it before the host has
seen it, CUDA kernels of ours do between its sessions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ojfa_export.backends.checks import same_for_all
from ojfa_export.backends.choice import PreparesByParts
from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.choosing import Chooser, choose_in_parts
from ojfa_export.backends.cuda.device import Device, PinnedArray
from ojfa_export.backends.cuda.mailbox import ROWS, DeviceHeadOutput, HeadArguments
from ojfa_export.backends.onnxruntime_cuda.executor import OnnxRuntimeCudaExecutor
from ojfa_export.backends.onnxruntime_cuda.opened import OpenedModel
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import CHECK_HEAD, OF_EXITS, block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.check_output import CheckOutput
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest
from ojfa_export.models.spec import ModelSpec


class OnnxRuntimeCudaEngines(OpenedModel, PreparesByParts):
    """An opened model, the passes over it and its heads.

    Args and attributes are those of `OpenedModel`, and:

    Attributes:
        follows: See `backends.backend.Engines`.
    """

    follows = True

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
        *,
        record: bool = True,
    ) -> None:
        super().__init__(device, spec, weights, engines, rotary, files, record=record)
        self._key = object()  # of this model's recordings
        self._states = self.arrays.lasting((ROWS, spec.hidden_size), np.float32)
        self._logits = self.arrays.lasting((ROWS, spec.vocab_size), np.float32)
        exits = np.arange(spec.blocks + 1, dtype=np.int32)[:, None, None]
        self._exits = self.arrays.upload(np.repeat(exits, ROWS, axis=1))
        self._pinned = PinnedArray((ROWS, spec.vocab_size), np.float32)

    def load_blocks(self, depth: int) -> None:
        """Uploads the weights of the embedding and the first blocks, and opens their sessions."""
        for name in ("embed", *map(block_name, range(depth))):
            self.weights(name)
            self.session(name)

    def unload_heads(self) -> None:
        """Lets go of the heads' weights; they are uploaded again when used."""
        for name in {"exit_head", CHECK_HEAD, "final_head"} & self.plans.keys():
            self.close(name)

    def executor(self, slots: int, capacity: int) -> OnnxRuntimeCudaExecutor:
        """Makes a KV cache; a block's part of it takes memory when it is first used."""
        return OnnxRuntimeCudaExecutor(self, slots, capacity)

    def logits(self, hidden: Float32 | DeviceArray, blocks_run: int) -> Float32:
        """Applies the head after so many blocks: [rows, H] to [rows, V]."""
        return self._logits_by(self._head_after(blocks_run), hidden, blocks_run)

    @property
    def has_check_head(self) -> bool:
        """See `backends.checks.ChecksExits`."""
        return CHECK_HEAD in self.plans

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
        result = np.empty((len(states), self._tokens_of(name)), np.float32)
        for at in range(0, len(states), ROWS):
            some, part = result[at : at + ROWS], self._in_place(states[at : at + ROWS])
            fetch = partial(self._fetch, self._logits_of(name, len(part)))
            self._with_head(name, part, blocks_run, ("logits",), fetch)
            self.device.synchronize()
            some[...] = self._pinned.array.reshape(-1)[: some.size].reshape(some.shape)
        return result

    def choose(
        self, hidden: Float32 | DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """Applies the head after so many blocks, and chooses on the device."""
        if request.check is None or not self.has_check_head:
            return self._ask(self._head_after(blocks_run), hidden, blocks_run, request)

        def whole(some: DeviceArray, asked: HeadRequest) -> HeadOutput:
            return self.choose(some, blocks_run, asked)

        states = self.arrays.asarray(hidden)
        return CheckOutput(self.check(states, blocks_run), states, request, whole)

    def _ask(
        self, name: str, hidden: Float32 | DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """Applies a head by the name of its graph, and chooses on the device."""
        self.device.make_current()
        states = self.arrays.asarray(hidden)
        return choose_in_parts(partial(self._choose, name, blocks_run), states, request)

    def _choose(
        self, name: str, blocks_run: int, states: DeviceArray, request: HeadRequest
    ) -> DeviceHeadOutput:
        states, logits = self._in_place(states), self._logits_of(name, len(states))
        # Nothing is begun ahead of an exit's check here, so that there is nothing to call off.
        asked = HeadArguments.of(request.part(slice(None)))
        self.mailbox.leave(request)
        chooser = Chooser(self.kernels, self.mailbox, self._tokens_of(name))
        chosen = partial(chooser.choose, logits, asked)
        self._with_head(name, states, blocks_run, ("choose", asked), chosen)
        self.device.recorder.flush()
        return self.mailbox.expect(len(states))

    def _head_after(self, blocks_run: int) -> str:
        """The graph of the head after so many blocks; behind exits' blocks it is the model's."""
        own = blocks_run == self.spec.blocks or self.exit_blocks is not None
        return "final_head" if own else "exit_head"

    def _tokens_of(self, name: str) -> int:
        """Tokens that a head's logits are of."""
        weights = self.plans[name].weights
        return weights["head" if "head" in weights else "vocabulary"].shape[0]

    def _logits_of(self, name: str, rows: int) -> DeviceArray:
        """Room for a head's logits of some rows: the first numbers of what all heads share."""
        return self._logits.reshape(rows, self._tokens_of(name))

    def _with_head(
        self,
        name: str,
        hidden: DeviceArray,
        blocks_run: int,
        then: tuple[Hashable, ...],
        follows: Callable[[], None],
    ) -> None:
        """Puts a head on the stream, and what is done with its logits (`then` is its key)."""
        same = OF_EXITS.isdisjoint(self.plans[name].weights)  # at every exit
        count = len(hidden)

        def work() -> None:
            exits = self._exits[blocks_run, :count].reshape(count)
            inputs = {"hidden": hidden, "blocks_run": exits}
            self.work(name, inputs, {"logits": self._logits_of(name, count)}).run()
            follows()

        exit = None if same else blocks_run
        self.add((self._key, name, exit, count, hidden.pointer, *then), work)

    def _fetch(self, logits: DeviceArray) -> None:
        self.device.download(logits.pointer, self._pinned.pointer, logits.nbytes)

    def _in_place(self, states: DeviceArray) -> DeviceArray:
        """Hidden states where they lie for long, as recordings refer to them."""
        if states.lasts:
            return states
        target = self._states[: len(states)]
        self.device.copy(states.pointer, target.pointer, states.nbytes)
        return target
