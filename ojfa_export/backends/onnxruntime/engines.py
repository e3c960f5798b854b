"""Running a bundle's engines on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ojfa_export.backends.backend import Float32, Int32, keep
from ojfa_export.backends.choice import ChoosesOnHost
from ojfa_export.backends.onnxruntime.ports import check_ports
from ojfa_export.backends.onnxruntime.session import failure, open_session
from ojfa_export.bundle.checked import UNCHECKED, Files
from ojfa_export.bundle.names import block_name
from ojfa_export.families.spec import ModelSpec

# Attention scores of a prefill are held for one piece of the prompt at a time: at most this
# many bytes.
SCORE_BYTES = 64 << 20


class OnnxRuntimeEngines(ChoosesOnHost):
    """An opened model.

    Args:
        spec: The model.
        weights: Directory of the weight files.
        engines: Engine files by graph name.
        rotary: Cosines and sines [rows, rotary_dim/2], or None.
        files: Opens the files.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Path,
        engines: Mapping[str, Path],
        rotary: tuple[Float32, Float32] | None,
        files: Files = UNCHECKED,
    ) -> None:
        self.spec = spec
        self.rotary = rotary
        self._weights, self._files = weights, files
        self._engines = engines
        self._sessions: dict[str, ort.InferenceSession] = {}

    def session(self, name: str) -> ort.InferenceSession:
        """The session of a graph, opened on first use."""
        if name not in self._sessions:
            model = self._files.read(self._engines[name])
            session = open_session(model, name, self._weights, self._files)
            check_ports(session, self.spec, name)
            self._sessions[name] = session
        return self._sessions[name]

    def close(self, name: str) -> None:
        """Closes the session of a graph; bindings to it must be dropped as well."""
        self._sessions.pop(name, None)

    def load_blocks(self, depth: int) -> None:
        """Opens the sessions of the embedding and the first blocks."""
        for name in ("embed", *map(block_name, range(depth))):
            self.session(name)

    def new_cache(self, batch_size: int, capacity: int) -> OnnxRuntimeCache:
        """Makes a cache; memory is taken as positions are written."""
        return OnnxRuntimeCache(self, batch_size, capacity)

    def logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """Applies the model's own head, or the exit head: [rows, H] to [rows, V]."""
        session = self.session("final_head" if blocks_run == self.spec.blocks else "exit_head")
        result: Float32 = session.run(None, head_inputs(session, hidden, blocks_run))[0]
        return result

    def unload_heads(self) -> None:
        """Closes both heads; they are opened again when used."""
        for name in ("exit_head", "final_head"):
            self.close(name)


def head_inputs(
    session: ort.InferenceSession, hidden: Float32, blocks_run: int
) -> dict[str, Float32 | Int32]:
    """What a head takes: hidden states [rows, H], and where it has gates, each row's exit."""
    inputs: dict[str, Float32 | Int32] = {"hidden": hidden}
    if len(session.get_inputs()) > 1:
        inputs["blocks_run"] = np.full(len(hidden), blocks_run, np.int32)
    return inputs


class OnnxRuntimeCache:
    """Keys and values [batch, kv_heads, capacity, head_dim] of each block, written in place.

    One-token steps reuse bindings (`_DecodeSteps`); prompts are bound as they come.
    """

    arrays: Any = np

    def __init__(self, engines: OnnxRuntimeEngines, batch_size: int, capacity: int) -> None:
        spec = engines.spec
        self._engines = engines
        self._shape = (batch_size, spec.kv_heads, capacity, spec.head_dim)
        self._values: dict[int, tuple[Float32, Float32]] = {}
        self._decode: dict[tuple[int, int, bool], _DecodeSteps] = {}
        per_token = 4 * spec.heads * capacity
        self._prefill_tokens = max(16, SCORE_BYTES // per_token)

    def embed(self, token_ids: Int32, starts: Sequence[int]) -> Float32:
        """Embeds tokens [rows, tokens] from these positions on: [rows, tokens, H]."""
        feeds = {"token_ids": token_ids}
        if self._engines.spec.learned_positions:
            tokens = np.arange(token_ids.shape[1])
            feeds["positions"] = (np.array(starts)[:, None] + tokens).astype(np.int32)
        hidden: Float32 = self._engines.session("embed").run(None, feeds)[0]
        return hidden

    def run_blocks(
        self,
        blocks: range,
        hidden: Float32,
        rows: slice,
        starts: Sequence[int],
        *,
        long_context: bool,
    ) -> Float32:
        """Runs consecutive blocks on new tokens; see `backends.backend.Cache`."""
        if hidden.shape[1] == 1:
            return self._decode_steps(rows, long_context).run(blocks, hidden, starts)
        for block in blocks:
            hidden = self._run_prompt(block, hidden, rows, starts[0], long_context)
        return hidden

    def _run_prompt(
        self, block: int, hidden: Float32, rows: slice, start: int, long_context: bool
    ) -> Float32:
        """Runs a block on several tokens of one sequence, a piece at a time."""
        tokens = hidden.shape[1]
        if tokens <= self._prefill_tokens:
            return self._run_prefill(block, hidden, rows, start, long_context)
        pieces = [
            self._run_prefill(
                block,
                np.ascontiguousarray(hidden[:, at : at + self._prefill_tokens]),
                rows,
                start + at,
                long_context,
            )
            for at in range(0, tokens, self._prefill_tokens)
        ]
        return np.concatenate(pieces, axis=1)

    def _decode_steps(self, rows: slice, long_context: bool) -> _DecodeSteps:
        key = (rows.start, rows.stop, long_context)
        if key not in self._decode:
            hidden_size = self._engines.spec.hidden_size
            self._decode[key] = _DecodeSteps(self, rows, hidden_size, long_context)
        return self._decode[key]

    def keep(self, kept: Float32, rows: slice, starts: Sequence[int], hidden: Float32) -> None:
        """Copies hidden states for later; see `backends.backend.Cache`."""
        keep(kept, rows, starts, hidden)

    def unload(self, block: int) -> None:
        """Closes a block's session; its keys and values stay."""
        for steps in self._decode.values():
            steps.unbind(block)
        self._engines.close(block_name(block))

    def _run_prefill(
        self, block: int, hidden: Float32, rows: slice, start: int, long_context: bool
    ) -> Float32:
        target = np.empty_like(hidden)
        last = start + hidden.shape[1] - 1
        self.bind(
            block,
            np.ascontiguousarray(hidden),
            target,
            rows,
            np.array([last], np.int32),
            np.array(last + 1, np.int32),
            long_context,
        )()
        return target

    def bind(
        self,
        block: int,
        source: Float32,
        target: Float32,
        rows: slice,
        last_positions: Int32,
        total_length: Int32,
        long_context: bool,
    ) -> Callable[[], None]:
        """Binds a block's inputs and outputs to memory; past and present are the same memory."""
        session = self._engines.session(block_name(block))
        if block not in self._values:
            # Pages are taken by the operating system as they are first written.
            self._values[block] = (
                np.empty(self._shape, np.float32),
                np.empty(self._shape, np.float32),
            )
        key, value = (array[rows] for array in self._values[block])
        inputs = {
            "hidden": source,
            "last_positions": last_positions,
            "total_length": total_length,
            "past_key": key,
            "past_value": value,
            **self._rotary_inputs(long_context),
        }
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in (("hidden_out", target), ("key", key), ("value", value)):
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        def run(
            arrays: object = (inputs, target),
        ) -> None:  # the arrays live as long as the binding
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # onnxruntime's exceptions share no base class but this
                raise failure(block_name(block), error) from error

        return run

    def _rotary_inputs(self, long_context: bool) -> dict[str, Float32]:
        if self._engines.rotary is None:
            return {}
        cos, sin = self._engines.rotary
        if self._engines.spec.rotary_switch is not None:
            half = len(cos) // 2
            part = slice(half, None) if long_context else slice(half)
            cos, sin = cos[part], sin[part]
        return {"rotary_cos_table": cos, "rotary_sin_table": sin}


class _DecodeSteps:
    """One-token steps of a group of rows, each block bound once.

    All that changes from step to step is what lies in the bound buffers; hidden states go back and
    forth between two of them. Little is done per block, as this is the path of every token.
    """

    def __init__(
        self, cache: OnnxRuntimeCache, rows: slice, hidden_size: int, long_context: bool
    ) -> None:
        count = rows.stop - rows.start
        self._cache, self._rows, self._long_context = cache, rows, long_context
        self._hidden = tuple(np.empty((count, 1, hidden_size), np.float32) for _ in range(2))
        self._last_positions = np.empty(count, np.int32)
        self._total_length = np.empty((), np.int32)
        self._runs: dict[int, Callable[[], None]] = {}

    def run(self, blocks: range, hidden: Float32, starts: Sequence[int]) -> Float32:
        """Runs consecutive blocks; see `OnnxRuntimeCache.run_blocks`."""
        self._hidden[blocks.start % 2][...] = hidden
        self._last_positions[...] = starts
        self._total_length[...] = max(starts) + 1
        for block in blocks:
            if block not in self._runs:
                self._runs[block] = self._bind(block)
            self._runs[block]()
        return self._hidden[blocks.stop % 2]

    def _bind(self, block: int) -> Callable[[], None]:
        return self._cache.bind(
            block,
            self._hidden[block % 2],
            self._hidden[1 - block % 2],
            self._rows,
            self._last_positions,
            self._total_length,
            self._long_context,
        )

    def unbind(self, block: int) -> None:
        """Drops the binding to a block's session."""
        self._runs.pop(block, None)
