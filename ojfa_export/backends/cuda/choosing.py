"""Choosing tokens on the device: launching the kernels of choose.cu and sample.cu."""

from __future__ import annotations

from collections.abc import Callable

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.kernels import Kernels, integer, pointer
from ojfa_export.backends.cuda.mailbox import (
    ROWS,
    DeviceHeadOutput,
    HeadArguments,
    JoinedHeadOutput,
    Mailbox,
)
from ojfa_export.decoding.head_output import HeadOutput, HeadRequest

# As in choose.cu and sample.cu.
CHOOSE_PARTS, CHOOSE_THREADS, SAMPLE_THREADS = 32, 512, 1024


class Chooser:
    """Answers from logits: the kernels of engines/kernels/choose.cu and sample.cu.

    Args:
        kernels: The compiled kernels.
        mailbox: Where answers go.
        tokens: Logits of a row.
    """

    def __init__(self, kernels: Kernels, mailbox: Mailbox, tokens: int) -> None:
        self.kernels, self.mailbox, self.tokens = kernels, mailbox, tokens

    def choose(self, logits: DeviceArray, asked: HeadArguments) -> None:
        """Gives an answer from logits [rows, V]."""
        self.kernels.launch(
            "choose",
            (CHOOSE_PARTS, len(logits), 1),
            (CHOOSE_THREADS, 1, 1),
            (
                pointer(logits.pointer),
                integer(self.tokens),
                *self.mailbox.asked(asked),
            ),
            overlapping=True,
        )
        self.sample(logits, asked)

    def sample(self, logits: DeviceArray, asked: HeadArguments) -> None:
        """Completes an answer where tokens are sampled."""
        if not asked.sampled:
            return
        self.kernels.launch(
            "sample",
            (len(logits), 1, 1),
            (SAMPLE_THREADS, 1, 1),
            (
                pointer(logits.pointer),
                integer(self.tokens),
                *self.mailbox.arguments(),
            ),
            overlapping=True,
        )


def choose_in_parts(
    choose: Callable[[DeviceArray, HeadRequest], DeviceHeadOutput],
    states: DeviceArray,
    request: HeadRequest,
) -> HeadOutput:
    """Next tokens for any number of rows.

    Args:
        choose: Gives them for as many rows as one answer has.
        states: [rows, H].
        request: How tokens are chosen; what follows an exit is left out where one answer isn't
            enough.
    """
    if len(states) <= ROWS:
        return choose(states, request)
    parts: list[DeviceHeadOutput] = []
    for at in range(0, len(states), ROWS):
        rows = slice(at, at + ROWS)
        parts.append(choose(states[rows], request.part(rows)))
        parts[-1].tokens()  # places for answers on their way are few
    return JoinedHeadOutput(parts)
