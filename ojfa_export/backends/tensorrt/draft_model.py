"""An opened draft layer on the GPU: a model of one block beside its model, and its head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.choosing import choose_in_parts
from ojfa_export.backends.cuda.device import PinnedArray
from ojfa_export.backends.cuda.mailbox import DeviceHeadOutput, HeadArguments
from ojfa_export.backends.draft import DraftLayer, token_bytes
from ojfa_export.backends.tensorrt.heads import HEAD_ROWS, FinalHead
from ojfa_export.backends.tensorrt.opened import OpenedModel
from ojfa_export.backends.tensorrt.tiled import matrix_shapes, most_tokens
from ojfa_export.bundle.names import DRAFT_GRAPHS, block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest

MEMORY, LAYER, HEAD = DRAFT_GRAPHS
# Positions of a prompt that run at once.
DRAFT_TOKENS = 512


class DraftModel(OpenedModel):
    """The layer's weights and kernels, and its head.

    Args:
        model: The model, whose embedding and head the layer may share.
        layer: The layer.

    Attributes:
        depths: See `backends.draft.DraftEngines`.
        names: Address of the ids [D] int32 of its tokens; 0 where its logits are of all.
    """

    pass_tokens = DRAFT_TOKENS

    def __init__(self, model: OpenedModel, layer: DraftLayer) -> None:
        files = layer.engines
        # The names of a model's graphs: the layer embeds, is one block, and has a final head.
        plans = {"embed": files[LAYER], block_name(0): files[LAYER], "final_head": files[HEAD]}
        plans[MEMORY] = files[MEMORY]
        super().__init__(
            model.device, layer.spec, layer.weights, plans, layer.rotary, layer.files, beside=model
        )
        self.depths, self.takes_whole = layer.depths, True
        self.token_bytes = token_bytes(layer, self.cache_dtype.itemsize)
        if self.precision != "fp32":
            room = self.device.multiprocessors, self.device.shared_bytes
            self._most_tiled = most_tokens(_shapes(layer), *room)
        self._tokens, self._vocab_size = layer.tokens, layer.vocab_size
        self._ids = None if layer.tokens is None else layer.tokens.tolist()
        self._names = None if layer.tokens is None else self.arrays.upload(layer.tokens[None])
        self.names = 0 if self._names is None else self._names.pointer
        self._key = object()  # of this layer's recordings
        self._head: _Head | None = None

    def logits(self, hidden: Float32 | DeviceArray, blocks_run: int) -> Float32:
        """See `backends.draft.DraftEngines`."""
        self.device.make_current()
        states, head = self.arrays.asarray(hidden), self._open_head()
        found = np.empty((len(states), self.spec.vocab_size), np.float32)
        for at in range(0, len(states), HEAD_ROWS):
            part = self._in_place(states[at : at + HEAD_ROWS], head)
            count = len(part)
            self.device.recorder.flush()
            head.final.run(part, head.logits[:count])
            size = found[at : at + count].nbytes
            self.device.download(head.logits.pointer, head.pinned.pointer, size)
            self.device.synchronize()
            found[at : at + count] = head.pinned.array[:count]
        if self._tokens is None:
            return found
        logits = np.full((len(found), self._vocab_size), -np.inf, np.float32)
        logits[:, self._tokens] = found
        return logits

    def choose(
        self, hidden: Float32 | DeviceArray, blocks_run: int, request: HeadRequest
    ) -> HeadOutput:
        """See `backends.draft.DraftEngines`."""
        if not self.device.recorder.pending:
            self.device.make_current()
        return self.named(choose_in_parts(self._choose, self.arrays.asarray(hidden), request))

    def ask(self, states: DeviceArray, request: HeadRequest) -> None:
        """Adds what chooses a token for each of a few rows [rows, H] that lie where they stay."""
        head, count, asked = self._open_head(), len(states), HeadArguments.of(request)
        key = ("draft head", self.mailbox, self._key, count, states.pointer, asked)
        self.device.recorder.add(key, lambda: head.final.choose(states, head.logits[:count], asked))

    def named(self, output: HeadOutput) -> HeadOutput:
        """What the head said, in tokens of the model."""
        return output if self._ids is None else NamedHeadOutput(output, self._ids)

    def _choose(self, states: DeviceArray, request: HeadRequest) -> DeviceHeadOutput:
        self.ask(self._in_place(states, self._open_head()), request)
        self.mailbox.leave(request)
        self.device.recorder.flush()
        return self.mailbox.expect(len(states))

    def _in_place(self, states: DeviceArray, head: _Head) -> DeviceArray:
        """Hidden states where they may stay, as recordings refer to them."""
        if states.lasts:
            return states
        target = head.states[: len(states)]
        self.device.copy(states.pointer, target.pointer, states.nbytes)
        return target

    def _open_head(self) -> _Head:
        if self._head is None:
            rows, spec, new = HEAD_ROWS, self.spec, self.arrays.lasting
            self._head = _Head(
                FinalHead(self),
                new((rows, spec.hidden_size), np.float32),
                new((rows, spec.vocab_size), np.float32),
                PinnedArray((rows, spec.vocab_size), np.float32),
            )
        return self._head


@dataclass(frozen=True, eq=False)
class _Head:
    """The layer's head, and room for rows of hidden states and logits."""

    final: FinalHead
    states: DeviceArray
    logits: DeviceArray
    pinned: PinnedArray


class NamedHeadOutput:
    """What a head over some tokens said, in tokens of the model.

    Args:
        output: What it said.
        names: Their ids.
    """

    def __init__(self, output: HeadOutput, names: list[int]) -> None:
        self._output, self._names = output, names

    def tokens(self) -> list[int]:
        """See `HeadOutput`."""
        return [self._names[each] for each in self._output.tokens()]

    def stand_ins(self) -> list[int]:
        """See `HeadOutput`; the model's tokens, so that asking waits."""
        return self.tokens()

    def likeliest(self) -> list[int]:
        """See `HeadOutput`."""
        return [self._names[each] for each in self._output.likeliest()]

    def confidence(self, measure: Measure) -> list[float]:
        """See `HeadOutput`."""
        return self._output.confidence(measure)


def _shapes(layer: DraftLayer) -> list[tuple[int, int]]:
    """[outputs, columns] of the layer's matrices."""
    (qkv, width), *others = matrix_shapes(layer.spec)
    return [(qkv, 2 * width), (width, len(layer.depths) * width), *others]
