"""Runs text through the engines and notes what exits say, one block in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ojfa_export.backends.backend import Engines, Executor
from ojfa_export.backends.checks import ChecksExits, checking
from ojfa_export.backends.passes import Chunk
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.errors import CalibrationError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.promises.measures import MEASURES, confidences, round_down, round_up
from ojfa_export.promises.statistics import ExitStatistics
from ojfa_export.system.progress import Progress

# Sampled from each window. Its mean is as good a loss as the mean over all tokens: of the same
# expectation, in [0, 1], and little more varied, since windows differ more than this rounds.
TOKENS_PER_WINDOW = 64
# Neighbours among them: how often an exit agrees several times running is what drafting needs.
RUN = 8


def collect_statistics(
    spec: ModelSpec,
    open_engines: Callable[[], Engines],
    domains: Sequence[str],
    windows: Sequence[Int32],
    scratch: Path,
    progress: Progress,
    rng: np.random.Generator,
    *,
    only: Sequence[int] | None = None,
    given: int = 0,
    most: int = TOKENS_PER_WINDOW,
) -> ExitStatistics:
    """Statistics of exits, on sampled tokens of the windows.

    Hidden states of one depth are on disk at a time, replaced in place by the next depth's.

    Args:
        spec: The model.
        open_engines: Opens the engines that ship, exit head included; called anew for each depth,
            so that one block's weights are in memory.
        domains: Names.
        windows: For each domain, [n, length] token ids.
        scratch: Folder for the hidden states, 4 n length H bytes.
        progress: Shows blocks.
        rng: Samples the tokens.
        only: Exits, rising; by default every one that there is. Of a model with a large
            vocabulary each takes about as long as a block.
        given: First tokens of each window that don't count.
        most: Tokens sampled from a window at most, a multiple of RUN.

    Raises:
        CalibrationError: Logits that are not finite.
        OSError: No room for the hidden states.
    """
    text = np.concatenate(windows)
    count, length = text.shape
    places, run = sample_places(rng, count, length - given, most)
    places += given
    served = open_engines().exit_blocks
    exits = tuple(range(1, spec.blocks)) if served is None else served.exits
    exits = exits if only is None else tuple(only)
    found = _Found(count, places.shape[1], exits, spec.blocks)
    with (
        _hidden_states(scratch, (count, length, spec.hidden_size)) as states,
        progress.task(_what(only), spec.blocks + 1, "blocks") as task,
    ):
        for depth in range(spec.blocks + 1):
            engines = open_engines()
            executor = engines.executor(1, length)
            for index, window in enumerate(text):
                end = int(places[index].max()) + 1  # nothing is asked of those after it
                hidden = _deepen(executor, window[:end], states, index, depth)
                states.write(index, hidden)
                if depth in (*exits, spec.blocks):
                    seen = _at_exit(engines, hidden, depth, spec.blocks)[places[index]]
                    logits = _logits(engines, seen, depth, spec.blocks)
                    checks = checking(engines) if depth < spec.blocks else None
                    asked = logits if checks is None else _checked(checks, seen, depth)
                    found.note(index, depth, logits, asked)
            task.advance()
    domain = np.repeat(np.arange(len(windows)), list(map(len, windows))).astype(np.int16)
    return found.statistics(tuple(domains), domain, run)


class _Found:
    """What exits say on sampled tokens, noted window by window.

    Args:
        count: Windows.
        sampled: Tokens of each.
        exits: That there are.
        blocks: L, the last of which is the full model.
    """

    def __init__(self, count: int, sampled: int, exits: tuple[int, ...], blocks: int) -> None:
        shape = count, sampled, len(exits)
        self._exits, self._blocks = exits, blocks
        self._confidence = np.empty((len(MEASURES), *shape), np.float16)
        self._tokens = np.empty(shape, np.int64)
        self._agrees = np.empty(shape, np.bool_)
        self._extra = np.empty(shape, np.float16)

    def note(self, window: int, blocks_run: int, logits: Float32, asked: Float32) -> None:
        """Notes what heads say of a window; the full model comes last.

        Args:
            window: Which.
            blocks_run: Before the head.
            logits: [sampled, V], whose token counts.
            asked: [sampled, V or fewer], whose confidence a policy compares with its thresholds.
        """
        if blocks_run < self._blocks:
            exit = self._exits.index(blocks_run)
            self._tokens[window, :, exit] = logits.argmax(axis=1)
            self._confidence[:, window, :, exit] = round_down(confidences(asked))
        else:
            self._agrees[window], self._extra[window] = compare(logits, self._tokens[window])

    def statistics(
        self, domains: tuple[str, ...], domain: NDArray[np.int16], run: int
    ) -> ExitStatistics:
        """All that was noted; see `ExitStatistics`."""
        return ExitStatistics(
            blocks=self._blocks,
            exits=self._exits,
            domains=domains,
            domain=domain,
            confidence=self._confidence,
            agrees=self._agrees,
            extra_surprisal=self._extra,
            run=run,
        )


class _HiddenStates:
    """Hidden states of windows in a file; mapped, all of them would count as memory."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int]) -> None:
        _, *self._window = shape
        self._file = file.fileno()
        # A full disk is an error here.
        os.posix_fallocate(self._file, 0, 4 * math.prod(shape))

    def read(self, window: int, tokens: int) -> Float32:
        """A window's first tokens, [tokens, H]."""
        rows = np.empty((tokens, self._window[1]), np.float32)
        os.preadv(self._file, [rows.data], self._place(window))
        return rows

    def write(self, window: int, rows: Float32) -> None:
        """A window's first tokens."""
        os.pwrite(self._file, np.ascontiguousarray(rows).data, self._place(window))

    def _place(self, window: int) -> int:
        return 4 * window * math.prod(self._window)


@contextmanager
def _hidden_states(scratch: Path, shape: tuple[int, int, int]) -> Iterator[_HiddenStates]:
    """Hidden states [n, length, H] in a file, which goes in the end."""
    path = scratch / "promise.f32"
    with path.open("w+b", buffering=0) as file:
        yield _HiddenStates(file, shape)
    path.unlink()


def sample_places(
    rng: np.random.Generator, count: int, length: int, most: int = TOKENS_PER_WINDOW
) -> tuple[NDArray[np.int64], int]:
    """Positions to look at in each window, every position as likely as any other.

    Args:
        rng: Random numbers.
        count: Windows.
        length: Tokens of a window.
        most: Of them that are sampled at most, a multiple of RUN.

    Returns:
        [count, sampled] positions in runs of neighbours, and the length of a run. A window's
        runs lie in one of its halves, where it has two that are long enough: where that is the
        first, the second needn't be run. Windows take halves in turns, so that both count the same
        in every domain. Runs begin at a random position and go round the half's end.
    """
    if length <= most:
        return np.tile(np.arange(length), (count, 1)), length
    halved = length % 2 == 0 and length // 2 >= most
    half = length // 2 if halved else length
    runs = np.tile(np.arange(half // RUN), (count, 1))
    chosen = np.sort(rng.permuted(runs, axis=1)[:, : most // RUN])
    first = RUN * chosen + rng.integers(half, size=(count, 1))
    places = (first[:, :, None] + np.arange(RUN)) % half
    places += half * ((np.arange(count)[:, None, None] + rng.integers(2)) % (1 + halved))
    return places.reshape(count, -1), RUN


def compare(
    logits: Float32, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.float16]]:
    """Compares exits' tokens with the full model.

    Args:
        logits: [n, V] of the full model.
        tokens: [n, E].

    Returns:
        [n, E] whether they agree, and [n, E] the extra surprisal, rounded up. The normaliser of the
        probabilities cancels: it is the difference of two logits.
    """
    choice = logits.argmax(axis=1)
    rows = np.arange(len(logits))
    behind = logits[rows, choice][:, None] - logits[rows[:, None], tokens]
    # Beyond float16's range it is beyond every clip as well.
    return tokens == choice[:, None], round_up(np.minimum(behind, np.float32(1000)))


def _what(only: Sequence[int] | None) -> str:
    """What is done, for people."""
    if only is None:
        return "running text through every exit"
    return f"certifying exit{'s' * (len(only) > 1)} {', '.join(map(str, only))}"


def _deepen(
    executor: Executor, text: Int32, states: _HiddenStates, window: int, depth: int
) -> Float32:
    """Hidden states [length, H] of a window after `depth` blocks, of those after one less."""
    chunks = [Chunk(0, 0, len(text))]
    if depth == 0:
        return np.asarray(executor.embed(text.tolist(), chunks))
    block, source = range(depth - 1, depth), states.read(window, len(text))
    return np.asarray(executor.run(block, source, chunks, long_context=False))


def _checked(checks: ChecksExits, hidden: Float32, blocks_run: int) -> Float32:
    return _finite(checks.check_logits(hidden, blocks_run), "check head")


def _at_exit(engines: Engines, hidden: Float32, depth: int, blocks: int) -> Float32:
    """What a head sees of a whole window [length, H]: behind an exit's block, what that gives."""
    if engines.exit_blocks is None or depth == blocks:
        return hidden
    chunks, source = [Chunk(0, 0, len(hidden))], np.ascontiguousarray(hidden)
    executor = engines.exit_blocks.executor(1, len(hidden))
    return np.asarray(executor.run(depth, source, chunks, long_context=False))


def _logits(engines: Engines, hidden: Float32, blocks_run: int, blocks: int) -> Float32:
    whose = "full model" if blocks_run == blocks else "exit head"
    return _finite(engines.logits(np.ascontiguousarray(hidden), blocks_run), whose)


def _finite(logits: Float32, whose: str) -> Float32:
    if not np.isfinite(logits).all():
        raise CalibrationError(
            f"the {whose}'s logits hold NaN or infinity on the calibration text",
            hint="build with --precision fp32, or check the checkpoint",
        )
    return logits
