"""Hidden states of the calibration text at every depth, on disk: one block in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Backend, Executor
from ojfa_export.backends.passes import Chunk
from ojfa_export.backends.precisions import wider_than_fp16
from ojfa_export.bundle.names import block_name
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.errors import CalibrationError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.progress import Progress


class HiddenStates:
    """Files of hidden states [tokens, H] float32, one per depth 0..L.

    Args:
        directory: Where they are.
        hidden_size: H.
        tokens: Rows of each file.
    """

    def __init__(self, directory: Path, hidden_size: int, tokens: int) -> None:
        self.directory = directory
        self.shape = (tokens, hidden_size)

    def path(self, depth: int) -> Path:
        """The file of a depth (blocks run)."""
        return self.directory / f"depth_{depth:02d}.f32"

    def open(self, depth: int) -> Float32:
        """Maps a depth's hidden states into memory."""
        states: Float32 = np.memmap(self.path(depth), np.float32, "r", 0, self.shape)
        return states

    def check_room(self, depths: int) -> None:
        """Refuses to begin what the disk can't hold.

        Raises:
            CalibrationError: Naming what is needed and what is free.
        """
        needed = 4 * depths * self.shape[0] * self.shape[1]
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise CalibrationError(
                f"{self.directory} has {free / 1e9:.1f} GB free; calibration needs "
                f"{needed / 1e9:.1f} GB for hidden states",
                hint="free some room, or use fewer --calibration-tokens",
            )


def collect_hidden_states(
    spec: ModelSpec,
    backend: Backend,
    weights: Path,
    engines: Mapping[str, Path],
    rotary: tuple[Float32, Float32] | None,
    windows: Int32,
    directory: Path,
    progress: Progress,
) -> HiddenStates:
    """Pushes all windows through the embedding, then through block after block.

    Args:
        spec: The model.
        backend: Runs the engines: what is calibrated is what ships.
        weights: Directory of the weight files.
        engines: Engine files by graph name.
        rotary: Tables of rotations, or None.
        windows: [n, length] token ids.
        directory: Where the hidden states go; files that are there and whole are kept.
        progress: Shows blocks.
    """
    count, length = windows.shape
    states = HiddenStates(directory, spec.hidden_size, count * length)
    states.check_room(spec.blocks + 1)
    with progress.task("calibrating: running text", spec.blocks + 1, "blocks") as task:
        for depth in range(spec.blocks + 1):
            if not states.path(depth).exists():
                # Opened anew for each block, so that only one block's weights are in memory.
                opened = backend.open_engines(spec, weights, engines, rotary)
                executor = opened.executor(1, length)
                partial = states.path(depth).with_suffix(".partial")
                source = None if depth == 0 else states.open(depth - 1).reshape(count, length, -1)
                with partial.open("wb") as file:
                    for index, window in enumerate(windows):
                        before = None if source is None else source[index]
                        hidden = _run_window(executor, window, before, depth)
                        if not np.isfinite(hidden).all():
                            raise _not_finite(
                                spec, weights, rotary, before, depth, wider_than_fp16(backend)
                            )
                        file.write(hidden.tobytes())
                    file.flush()
                    os.fsync(file.fileno())
                partial.rename(states.path(depth))
            task.advance()
    return states


def _run_window(executor: Executor, window: Int32, before: Float32 | None, depth: int) -> Float32:
    """Hidden states [length, H] of a window at a depth, of those one block before it."""
    chunks = [Chunk(0, 0, len(window))]
    if before is None:
        return np.asarray(executor.embed(window.tolist(), chunks))
    block = range(depth - 1, depth)
    states = np.ascontiguousarray(before)
    return np.asarray(executor.run(block, states, chunks, long_context=False))


def _not_finite(
    spec: ModelSpec,
    weights: Path,
    rotary: tuple[Float32, Float32] | None,
    before: Float32 | None,
    depth: int,
    wider: str,
) -> CalibrationError:
    """What to raise where hidden states are not finite: names a tensor that fp16 can't hold.

    Args:
        spec: The model.
        weights: Directory of the weight files.
        rotary: Tables of rotations, or None.
        before: What went in, [length, H]; None for the embedding.
        depth: Blocks run.
        wider: Options that may help.
    """
    from ojfa_export.verify.blocks import largest_tensor
    from ojfa_export.verify.exact import ExactModel
    from ojfa_export.verify.tolerances import FP16_LARGEST

    hint = "build with --precision fp32, or check the checkpoint"
    where = "the embedding" if depth == 0 else f"block {depth}"
    if before is not None and np.isfinite(before).all():
        exact = ExactModel(spec, weights, rotary)
        largest = largest_tensor(exact.block(depth - 1, before[None].astype(np.float64)))
        if largest.value > FP16_LARGEST:
            return CalibrationError(
                f"fp16 overflows in {block_name(depth - 1)} on the calibration text: "
                f"{largest.tensor} reaches {largest.value:.3g}, fp16 holds {FP16_LARGEST:.0f}",
                hint=f"build with {wider}",
            )
    return CalibrationError(
        f"hidden states after {where} hold NaN or infinity on the calibration text", hint=hint
    )
