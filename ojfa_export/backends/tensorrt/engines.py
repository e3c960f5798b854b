"""An opened model on the GPU: weights, engines and kernels, loaded when first used."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ojfa_export.backends.backend import Executor
from ojfa_export.backends.cuda.arrays import DTYPES, DeviceArray, DeviceArrays
from ojfa_export.backends.cuda.choosing import Chooser, choose_in_parts
from ojfa_export.backends.cuda.device import Device, PinnedArray
from ojfa_export.backends.cuda.embedding import embed
from ojfa_export.backends.cuda.kernels import Argument, Kernels
from ojfa_export.backends.cuda.mailbox import Asked, DeviceChoices, Mailbox
from ojfa_export.backends.cuda.recorder import Work
from ojfa_export.backends.passes import Newest, Pass
from ojfa_export.backends.tensorrt.blocks import Workspace
from ojfa_export.backends.tensorrt.engine import Engine, EngineSet
from ojfa_export.backends.tensorrt.executor import NewestDecode, TensorRtExecutor
from ojfa_export.backends.tensorrt.heads import (
    HEAD_ROWS,
    ExitHead,
    FinalHead,
    Head,
    Keeping,
    ResidualExitHead,
)
from ojfa_export.backends.tensorrt.linear import MOST_TOKENS, LinearKernels
from ojfa_export.backends.tensorrt.memory import Request, Room
from ojfa_export.backends.tensorrt.plan import GraphPlan, read_plan
from ojfa_export.backends.tensorrt.products import Products
from ojfa_export.backends.tensorrt.replays import Replays
from ojfa_export.backends.tensorrt.tiled import TiledKernels, matrix_shapes, most_tokens
from ojfa_export.backends.tensorrt.weights import WeightStore
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import block_name
from ojfa_export.decoding.arrays import Float32
from ojfa_export.decoding.head_output import Choices, Choosing
from ojfa_export.errors import UsageError
from ojfa_export.models.spec import ModelSpec, Precision

DECODE_VARIABLE = "OJFA_DECODE"


class TensorRtEngines:
    """An opened model.

    Args:
        device: The GPU.
        spec: The model.
        weights: Directory of the weight files.
        engines: Plans by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.

    Attributes:
        follows: See `backends.backend.Engines`.
        decode_kernels: Whether steps of a few tokens run in CUDA kernels of ours rather than in
            TensorRT's engines (OJFA_DECODE=engines).
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
    ) -> None:
        device.make_current()
        self.device, self.spec = device, spec
        self.arrays = DeviceArrays(device)
        self.decode_kernels = _decode_kernels()
        self._files = files
        self._directory = next(iter(engines.values())).parent
        self._plans = {name: read_plan(path, files) for name, path in engines.items()}
        embed = self._plans["embed"]
        self.precision: Precision = embed.precision
        self.kernels: dict[Precision, Kernels] = {
            kind: Kernels(device, files.read(self._directory / file))
            for kind, file in embed.kernels.items()
        }
        self.store = WeightStore(device, weights, self.kernels, files)
        self._room = Room(spec, DTYPES[self.precision].itemsize, self._plans)
        self.rotary = tuple(map(self.arrays.upload, rotary)) if rotary else None
        self.rotary_rows = len(rotary[0]) if rotary else 0
        self._engines: EngineSet | None = None
        self._weights: dict[str, dict[str, DeviceArray]] = {}
        self._heads: dict[int, Head] = {}  # by blocks run
        self.mailbox = Mailbox(device)
        chosen = self.kernels[self.precision]
        self.chooser = Chooser(chosen, self.mailbox, spec.vocab_size)
        self._tiled, self._most_tiled = None, 0
        if self.precision == "fp16":
            self._tiled = TiledKernels(device, self.arrays, chosen, spec.hidden_size)
            room = device.multiprocessors, device.shared_bytes
            self._most_tiled = most_tokens(matrix_shapes(spec), *room)
        # The newest one-token pass, whose result still lies where it was computed; and the blocks
        # that were begun after it, ahead of an exit's check.
        self.last_pass: NewestDecode | None = None
        self.ahead: range | None = None
        # What was asked to be kept last, and its recording's key: a head may do it along the way.
        self.keeping: tuple[tuple[Hashable, ...], Keeping | None] = (), None
        self._replays = Replays(self)
        self._states = self.arrays.lasting((HEAD_ROWS, spec.hidden_size), np.float32)
        self._logits = self.arrays.lasting((HEAD_ROWS, spec.vocab_size), np.float32)
        self._pinned = PinnedArray((HEAD_ROWS, spec.vocab_size), np.float32)

    def plan(self, name: str) -> GraphPlan:
        """A graph's plan."""
        return self._plans[name]

    def weights(self, name: str) -> dict[str, DeviceArray]:
        """A graph's weights, uploaded on first use."""
        if name not in self._weights:
            self._weights[name] = self.store.load(self._plans[name])
        return self._weights[name]

    def engine(self, name: str, part: str) -> Engine:
        """An engine; equal blocks share theirs. All are opened when one is first used."""
        if self._engines is None:
            files = {file for plan in self._plans.values() for file in plan.engines.values()}
            paths = [self._directory / file for file in files]
            self._engines = EngineSet(self.device, paths, self._files)
        return self._engines[self._plans[name].engines[part]]

    def products(self, tokens: int) -> Products | None:
        """The kernels that run so many tokens of a step; None where TensorRT's engines do."""
        if not self.decode_kernels:
            return None
        if tokens <= MOST_TOKENS:
            return self.linear(self.precision)
        return self._tiled if tokens <= self._most_tiled else None

    def linear(self, precision: Precision) -> LinearKernels:
        """The matrix-vector kernels for matrices of a precision."""
        return LinearKernels(self.device, self.kernels[precision], DTYPES[precision].itemsize)

    def close(self, name: str) -> None:
        """Lets go of a graph's weights."""
        self.device.recorder.clear()
        self._weights.pop(name, None)
        self.store.forget(self._plans[name])

    def embed(
        self, workspace: Workspace, named: tuple[Argument, Argument] | None = None, steps: int = 0
    ) -> None:
        """Puts the embedding of a workspace's tokens on the stream, into its first buffer.

        Args:
            workspace: The tokens'.
            named: Where ids and positions are, if not where the workspace names them.
            steps: Added to the positions.
        """
        kernels, hidden = self.kernels[self.precision], workspace.hidden[0]
        named = named or workspace.named_at
        embed(kernels, self.weights("embed"), hidden, named, workspace.positions, steps)

    @property
    def may_be_off(self) -> bool:
        """Whether kernels on the device may find themselves called off."""
        return self.ahead is not None or self.device.recorder.failed

    def call_off(self) -> None:
        """Before anything but the blocks that were begun ahead: they are not wanted."""
        self.last_pass = None
        if self.may_be_off:
            self.ahead, self.device.recorder.failed = None, False
            self.device.recorder.add(("go on", self.mailbox), self._go_on)

    def _go_on(self) -> None:
        kernels = self.kernels[self.precision]
        kernels.launch("go_on", (1, 1, 1), (1, 1, 1), (), overlapping=True)

    def load_blocks(self, depth: int) -> None:
        """Uploads the weights of the embedding and the first blocks."""
        self.check_room(Request(range(depth)))
        for name in ("embed", *map(block_name, range(depth))):
            self.weights(name)

    def check_room(self, request: Request, cached: Collection[int] = ()) -> None:
        """Refuses what won't fit, before any of it takes memory: see `memory.Room.check`."""
        self._room.check(
            request,
            self.device.available(),
            self.device.name,
            self.store.held,
            cached,
            opened=self._engines is not None,
        )

    def unload_heads(self) -> None:
        """Lets go of the heads' weights; they are uploaded again when used."""
        self._heads.clear()
        for name in ("exit_head", "final_head"):
            self.close(name)

    def executor(self, slots: int, capacity: int) -> TensorRtExecutor:
        """Makes a KV cache; a block's part of it takes memory when it is first used."""
        return TensorRtExecutor(self, slots, capacity)

    def logits(self, hidden: Float32 | DeviceArray, blocks_run: int) -> Float32:
        """Applies the head after so many blocks: [rows, H] to [rows, V]."""
        self.device.make_current()
        states = self.arrays.asarray(hidden)
        head = self._head(blocks_run)
        if self.may_be_off:
            self.call_off()
        result = np.empty((len(states), self.spec.vocab_size), np.float32)
        for at in range(0, len(states), HEAD_ROWS):
            part = states if len(states) <= HEAD_ROWS else states[at : at + HEAD_ROWS]
            count, size = len(part), result[at : at + HEAD_ROWS].nbytes

            part = self._in_place(part)

            def work(part: DeviceArray = part, count: int = count, size: int = size) -> None:
                head.run(part, self._logits[:count])
                self.device.download(self._logits.pointer, self._pinned.pointer, size)

            self.device.recorder.add(
                ("logits", self.mailbox, blocks_run, count, part.pointer), work
            )
            self.device.synchronize()
            result[at : at + HEAD_ROWS] = self._pinned.array[:count]
        return result

    def choose(self, hidden: Float32 | DeviceArray, blocks_run: int, how: Choosing) -> Choices:
        """Applies the head after so many blocks, and chooses on the device."""
        if not self.device.recorder.pending:  # else this thread has just run blocks
            self.device.make_current()
        states = self.arrays.asarray(hidden)
        if self.may_be_off:
            self.call_off()
        return choose_in_parts(partial(self._choose, blocks_run), states, how)

    def prepare(
        self,
        executor: Executor,
        step: Pass,
        states: DeviceArray | None,
        newest: Newest,
        how: Choosing,
    ) -> Callable[[], Choices]:
        """Gets ready to run a pass and ask the head there; see `backends.backend.Engines`."""
        assert isinstance(executor, TensorRtExecutor)
        self.device.make_current()
        return self._replays.prepare(executor, step, states, newest, how)

    def _choose(self, blocks_run: int, states: DeviceArray, how: Choosing) -> DeviceChoices:
        head, count = self._head(blocks_run), states.shape[0]
        states = self._in_place(states)
        last, stop, sampling = self.last_pass, how.stop, how.sampling
        if last is None or not last.executor.can_begin(last):
            stop = None
        recorder, (key, keeping) = self.device.recorder, self.keeping
        if keeping is not None and not (keeping.keeps(states) and recorder.take_back(key)):
            key, keeping = (), None
        self.keeping = (), None

        def work() -> None:
            asked = Asked.of(Choosing(sampling, (), stop), self.spec.vocab_size)
            head.choose(states, self._logits[:count], asked, keeping)

        asked = sampling.temperature, sampling.top_k, sampling.top_p, stop
        key = ("choose", self.mailbox, blocks_run, count, states.pointer, *asked, *key)
        if stop is None or last is None:
            recorder.add(key, work)
        else:
            then, ahead = last.executor.begin(last, stop.then)
            both = self.device.beside if head.slight else _one_after_the_other
            recorder.add((*key, *then), lambda: both(work, ahead))
        self.mailbox.leave(how.draws)
        recorder.flush()
        return self.mailbox.expect(count)

    def _in_place(self, states: DeviceArray) -> DeviceArray:
        """Hidden states where they always lie, as recordings refer to them."""
        last = self.last_pass
        if last is not None and last.holds(states):
            return states
        self.last_pass = None
        target = self._states[: len(states)]
        self.device.copy(states.pointer, target.pointer, states.nbytes)
        return target

    def _head(self, blocks_run: int) -> Head:
        head = self._heads.get(blocks_run)
        if head is None:
            head = self._heads[blocks_run] = self._open_head(blocks_run)
        return head

    def _open_head(self, blocks_run: int) -> Head:
        if blocks_run == self.spec.blocks:
            return FinalHead(self)
        if "gates" in self._plans["exit_head"].weights:
            return ResidualExitHead(self, blocks_run)
        # Every exit's head is the same: none but a residual jump knows of exits.
        others = (head for head in self._heads.values() if isinstance(head, ExitHead))
        return next(others, None) or ExitHead(self)


def _one_after_the_other(first: Work, second: Work) -> None:
    first()
    second()


def _decode_kernels() -> bool:
    value = os.environ.get(DECODE_VARIABLE, "") or "kernels"
    if value not in ("kernels", "engines"):
        raise UsageError(f"{DECODE_VARIABLE} must be 'kernels' or 'engines', not '{value}'")
    return value == "kernels"
