"""Embedding tokens that the device knows: launching the kernel of engines/kernels/embed.cu."""

from __future__ import annotations

from collections.abc import Mapping

from ojfa_export.backends.cuda.arrays import DeviceArray
from ojfa_export.backends.cuda.kernels import Argument, Kernels, integer, pointer

EMBED_THREADS = 256


def embed(
    kernels: Kernels,
    weights: Mapping[str, DeviceArray],
    hidden: DeviceArray,
    named: tuple[Argument, Argument],
    positions: int,
    steps: int = 0,
    chosen: int = 0,
) -> None:
    """Puts the embedding of tokens on the stream.

    Args:
        kernels: Compiled for the weights' precision.
        weights: `token_embedding`, and `position_embedding` where positions are learned.
        hidden: Where it goes, [..., H] fp32.
        named: Addresses of the ids and of the positions, int32; the host's memory will do.
        positions: Address to write the positions to, for the kernels after this one.
        steps: Added to the positions first.
        chosen: Address of the tokens that ids below 0 name; see `Mailbox.chosen`.
    """
    learned = weights.get("position_embedding")
    width = hidden.shape[-1]
    kernels.launch(
        "embed",
        (hidden.nbytes // (4 * width), 1, 1),
        (EMBED_THREADS, 1, 1),
        (
            pointer(hidden.pointer),
            pointer(weights["token_embedding"].pointer),
            pointer(None if learned is None else learned.pointer),
            *named,
            pointer(positions),
            integer(steps),
            integer(width),
            pointer(chosen),
        ),
        overlapping=True,
    )
