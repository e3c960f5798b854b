"""How answers of the device come to the host: a few numbers in memory that both can reach.

Kernels write them there, each with the number of its answer (engines/kernels/choose.cuh); the host
looks until all are there. That is sooner known than the end of all work, which need not have come.
"""

from __future__ import annotations

import struct
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ojfa_export.backends.cuda.device import Device, Memory, PinnedArray
from ojfa_export.backends.cuda.kernels import Argument, integer, pointer, wide_number
from ojfa_export.decoding.confidence import Measure
from ojfa_export.decoding.head_output import HeadRequest
from ojfa_export.errors import BackendError

# As in choose.cuh: answers that may be on their way, rows of each, thread blocks' parts of them.
SLOTS, ROWS, PARTS = 8, 64, 2048
# How a row's token is drawn; where the temperature is 0, or there is no top-k, it says so by 0.
DRAWING = np.dtype(
    [("draw", np.float64), ("top_p", np.float64), ("temperature", np.float32), ("top_k", np.int32)]
)
# Smaller temperatures leave the largest logit alone, as this does.
LEAST_TEMPERATURE = 1e-30
MOST_TOP_K = 2**31 - 1
# Token, likeliest, top, margin and entropy, each with the number of its answer.
ANSWER = struct.Struct("=iIiIfIfIfI")
Row = tuple[int, int, float, float, float]
PART_BYTES = 5 * 8
CHOSEN_AT = 4 * ROWS + 2 * 4 + 4 * ROWS + PART_BYTES * PARTS
DESK_BYTES = CHOSEN_AT + 4 * SLOTS * ROWS
MEASURES: dict[Measure, int] = {"top": 0, "margin": 1, "entropy": 2}
# Looks between two that let other threads run, and between two at the stream's state.
LOOKS, LOOKS_AT_STREAM = 32, 1 << 14


@dataclass(frozen=True)
class HeadArguments:
    """What is asked of an answer, as kernels take it; the same for the same key.

    Attributes:
        measure: Of an exit's check, or -1.
        threshold: Of that check.
        sampled: Whether any row's token is drawn; how, is left in the mailbox.
    """

    measure: int
    threshold: float
    sampled: bool

    @classmethod
    def of(cls, request: HeadRequest) -> HeadArguments:
        """What a session asks."""
        check = request.check
        return cls(
            measure=-1 if check is None else MEASURES[check.measure],
            threshold=0.0 if check is None else check.threshold,
            sampled=request.samples,
        )


class Mailbox:
    """Answers on their way, in the order in which they are asked for.

    Args:
        device: Where they are made.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._desk = Memory(device, DESK_BYTES, pooled=False)
        answers, drawings = SLOTS * ROWS * ANSWER.size, SLOTS * ROWS * DRAWING.itemsize
        self._mail = PinnedArray((answers + drawings,), np.uint8)
        whole = self._mail.array
        self._bytes = memoryview(whole)  # type: ignore[arg-type]
        self._drawings = whole[answers:].view(DRAWING).reshape(SLOTS, ROWS)
        self.reset()

    @property
    def tokens(self) -> int:
        """Address of the newest answer's tokens on the device."""
        return self._desk.pointer

    @property
    def chosen(self) -> int:
        """Address of the last answers' tokens on the device, [SLOTS, ROWS]."""
        return self._desk.pointer + CHOSEN_AT

    def stand_ins(self, slot: int, turn: int, rows: int) -> list[int] | None:
        """Ids by which embeddings find an answer's tokens; None where others took their places."""
        if (self._turn - turn) % (1 << 32) >= SLOTS:
            return None
        first = -1 - slot * ROWS
        return list(range(first, first - rows, -1))

    def reset(self) -> None:
        """Begins anew, with no answer on its way."""
        self._device.clear(self._desk.pointer, DESK_BYTES)
        self._device.synchronize()
        self._mail.array[...] = 0
        self._turn = 0
        self._places: list[Callable[[], DeviceHeadOutput | None]] = [lambda: None] * SLOTS

    def arguments(self) -> tuple[Argument, Argument]:
        """Of a kernel that writes answers."""
        return pointer(self._desk.pointer), pointer(self._mail.pointer)

    def asked(self, asked: HeadArguments) -> tuple[Argument, ...]:
        """Of a kernel that gives answers, unless another samples after it."""
        sampled = integer(int(asked.sampled))
        return *self.arguments(), integer(asked.measure), wide_number(asked.threshold), sampled

    def leave(self, request: HeadRequest, answers: int = 1) -> None:
        """Makes room for what is launched next, and leaves how the first answer's tokens are drawn.

        Args:
            request: Of the first answer.
            answers: That are launched together.
        """
        for turn in range(self._turn, self._turn + answers):
            before = self._places[turn % SLOTS]()
            if before is not None:
                before.answers()  # another takes its place
        if not request.samples:
            return
        rows = zip(request.draws, request.of_rows(len(request.draws)), strict=True)
        self._drawings[self._turn % SLOTS, : len(request.draws)] = [
            (
                draw,
                sampling.top_p,
                max(sampling.temperature, LEAST_TEMPERATURE) if sampling.temperature else 0.0,
                min(sampling.top_k or 0, MOST_TOP_K),
            )
            for draw, sampling in rows
        ]

    def expect(self, rows: int) -> DeviceHeadOutput:
        """Tells of an answer that has been launched."""
        slot, self._turn = self._turn % SLOTS, (self._turn + 1) & 0xFFFFFFFF
        choices = DeviceHeadOutput(self, slot, self._turn, rows, self._device.recorder.launches)
        self._places[slot] = weakref.ref(choices)
        return choices

    def is_newest(self, choices: object) -> bool:
        """Whether choices are the last that were launched, so that `tokens` will be theirs."""
        return isinstance(choices, DeviceHeadOutput) and choices.turn == self._turn

    def read(self, slot: int, turn: int, rows: int, launch: int) -> list[Row]:
        """Waits for an answer."""
        looks, place, idle = 0, slot * ROWS * ANSWER.size, False
        look, mail, stamps = ANSWER.unpack_from, self._bytes, (turn,) * 5
        answers: list[Row] = []
        while len(answers) < rows:
            if look(mail, place)[1::2] == stamps:
                # Read again: a value is read before its number, and may be older than that.
                answers.append(look(mail, place)[::2])
                place += ANSWER.size
                continue
            if idle:
                raise BackendError(
                    "the GPU gave no answer", hint="please report this with the command"
                )
            looks += 1
            if looks % LOOKS == 0:
                time.sleep(0)
                idle = looks % LOOKS_AT_STREAM == 0 and self._device.idle()
        recorder = self._device.recorder
        if launch > recorder.done:
            recorder.done = launch
        return answers


class DeviceHeadOutput:
    """Next tokens on their way from the device; see `decoding.head_output.HeadOutput`.

    Args:
        mailbox: Where they come.
        slot: In which place.
        turn: As which answer.
        rows: How many.
        launch: With which launch.
    """

    def __init__(self, mailbox: Mailbox, slot: int, turn: int, rows: int, launch: int) -> None:
        self._mailbox, self._awaited = mailbox, (slot, turn, rows, launch)
        self.turn = turn
        self._answers: list[Row] | None = None

    def answers(self) -> list[Row]:
        """Token, likeliest token, top, margin and entropy of each row."""
        if self._answers is None:
            self._answers = self._mailbox.read(*self._awaited)
        return self._answers

    def tokens(self) -> list[int]:
        """See `HeadOutput`."""
        return [answer[0] for answer in self.answers()]

    def stand_ins(self) -> list[int]:
        """See `HeadOutput`."""
        known = self._answers is not None
        return (None if known else self._mailbox.stand_ins(*self._awaited[:3])) or self.tokens()

    def likeliest(self) -> list[int]:
        """See `HeadOutput`."""
        return [answer[1] for answer in self.answers()]

    def confidence(self, measure: Measure) -> list[float]:
        """See `HeadOutput`."""
        place = 2 + MEASURES[measure]
        return [answer[place] for answer in self.answers()]


class JoinedHeadOutput:
    """Next tokens of more rows than one answer has."""

    def __init__(self, parts: Sequence[DeviceHeadOutput]) -> None:
        self._parts = parts

    def tokens(self) -> list[int]:
        """See `HeadOutput`."""
        return [token for part in self._parts for token in part.tokens()]

    def stand_ins(self) -> list[int]:
        """See `HeadOutput`."""
        return [token for part in self._parts for token in part.stand_ins()]

    def likeliest(self) -> list[int]:
        """See `HeadOutput`."""
        return [token for part in self._parts for token in part.likeliest()]

    def confidence(self, measure: Measure) -> list[float]:
        """See `HeadOutput`."""
        return [each for part in self._parts for each in part.confidence(measure)]
