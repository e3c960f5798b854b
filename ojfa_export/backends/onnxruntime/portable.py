"""The portable graphs as anyone may run them: plain ONNX Runtime, the cache concatenated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ojfa_export.backends.onnxruntime.engines import head_inputs
from ojfa_export.backends.onnxruntime.session import share_thread_pool
from ojfa_export.bundle.names import CHECK_HEAD, block_name, exit_block_name
from ojfa_export.bundle.onnx_file import read_onnx
from ojfa_export.decoding.arrays import Float32, Int32
from ojfa_export.errors import BackendError
from ojfa_export.models.spec import ModelSpec

KeysValues = tuple[NDArray[Any], NDArray[Any]]
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class PortableGraphs:
    """Runs the graphs of a directory; only the one used last is open.

    Args:
        spec: The model.
        directory: The bundle's graphs directory.
    """

    def __init__(self, spec: ModelSpec, directory: Path) -> None:
        self.spec = spec
        self._directory = directory
        self._open: tuple[str, ort.InferenceSession] | None = None

    def embed(
        self, token_ids: Int32, positions: Int32, *, long_context: bool
    ) -> tuple[Float32, dict[str, Float32]]:
        """Embeds tokens.

        Args:
            token_ids: [B,S].
            positions: [B,S].
            long_context: Whether LongRoPE's long factors apply.

        Returns:
            Hidden states [B,S,H], and the rotations [B,S,rotary_dim/2] that blocks take.
        """
        session = self._session("embed")
        feeds = {"token_ids": token_ids, "positions": positions}
        if self.spec.rotary_switch is not None:
            feeds["long_context"] = np.array(long_context, np.int32)
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        return outputs.pop("hidden"), outputs

    def block(
        self,
        index: int,
        hidden: Float32,
        positions: Int32,
        rotations: dict[str, Float32],
        past: KeysValues | None = None,
    ) -> tuple[Float32, KeysValues]:
        """Runs a block on new tokens.

        Args:
            index: Which block.
            hidden: [B,S,H].
            positions: [B,S].
            rotations: As `embed` gives them for these positions.
            past: Keys and values [B,kv_heads,past,head_dim] of the tokens before, or None.

        Returns:
            Hidden states [B,S,H], and the keys and values with the new tokens' appended.
        """
        return self._run_block(block_name(index), hidden, positions, rotations, past, {})

    def exit_block(
        self,
        index: int,
        exit: int,
        hidden: Float32,
        positions: Int32,
        rotations: dict[str, Float32],
        past: KeysValues | None = None,
    ) -> tuple[Float32, KeysValues]:
        """Runs a block that stands behind exits on new tokens.

        Args:
            index: Which of these blocks.
            exit: Whose tokens they are, the shortcut's exits being numbered from 0.
            hidden: As of `block`.
            positions: As of `block`.
            rotations: As of `block`.
            past: As of `block`.

        Returns:
            As `block`.
        """
        beside = {"exit": np.full(hidden.shape[:2], exit, np.int32)}
        name = exit_block_name(index)
        return self._run_block(name, hidden, positions, rotations, past, beside)

    def _run_block(
        self,
        name: str,
        hidden: Float32,
        positions: Int32,
        rotations: dict[str, Float32],
        past: KeysValues | None,
        beside: dict[str, Int32],
    ) -> tuple[Float32, KeysValues]:
        session = self._session(name)
        if past is None:
            past = self._empty_past(session, hidden.shape[0])
        feeds = {
            "hidden": hidden,
            "positions": positions,
            "past_key": past[0],
            "past_value": past[1],
            **rotations,
            **beside,
        }
        result, key, value = session.run(["hidden_out", "key", "value"], feeds)
        return result, (
            np.concatenate([past[0], key], axis=2),
            np.concatenate([past[1], value], axis=2),
        )

    def logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """Applies the model's own head, or the exit head: [rows, H] to [rows, V]."""
        own = blocks_run == self.spec.blocks or not self._has("exit_head")
        session = self._session("final_head" if own else "exit_head")
        return _run_head(session, hidden, blocks_run)

    def check_logits(self, hidden: Float32, blocks_run: int) -> Float32:
        """Applies the check head: [rows, H] to [rows, n]."""
        return _run_head(self._session(CHECK_HEAD), hidden, blocks_run)

    def close(self) -> None:
        """Closes the graph that is open; what runs next opens its own."""
        self._open = None

    def _empty_past(self, session: ort.InferenceSession, batch: int) -> KeysValues:
        dtype = next(DTYPES[port.type] for port in session.get_inputs() if port.name == "past_key")
        empty = np.zeros((batch, self.spec.kv_heads, 0, self.spec.head_dim), dtype)
        return empty, empty

    def _has(self, name: str) -> bool:
        return (self._directory / f"{name}.onnx").exists()

    def _session(self, name: str) -> ort.InferenceSession:
        if self._open is None or self._open[0] != name:
            self.close()  # its memory goes before the next one's is taken
            self._open = name, open_portable(self._directory / f"{name}.onnx")
        return self._open[1]


def _run_head(session: ort.InferenceSession, hidden: Float32, blocks_run: int) -> Float32:
    logits: Float32 = session.run(["logits"], head_inputs(session, hidden, blocks_run))[0]
    return logits


def _runnable(path: Path) -> str | bytes:
    """A graph that the CPU provider runs: the file, or what stands for it in bf16."""
    model = path.read_bytes()
    if all(tensor.dtype != "bfloat16" for tensor in read_onnx(model).tensors.values()):
        return os.fspath(path)
    import onnx

    from ojfa_export.backends.onnxruntime.widened import widen

    return widen(onnx.ModelProto.FromString(model))


def open_portable(path: Path) -> ort.InferenceSession:
    """Opens a portable graph.

    Raises:
        BackendError: ONNX Runtime refuses it.
    """
    share_thread_pool()  # with it, ONNX Runtime takes no session with threads of its own
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    try:
        return ort.InferenceSession(
            _runnable(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't open {path}: {str(error).splitlines()[0]}",
            hint="build the bundle again",
        ) from error
