"""The portable graphs of a draft layer, run as verification needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ojfa_export.backends.onnxruntime.portable import open_portable
from ojfa_export.bundle.draft_shortcut import DraftShortcut, rotations
from ojfa_export.bundle.names import DRAFT_GRAPHS
from ojfa_export.decoding.arrays import Float32


class PortableDraft:
    """Runs the portable graphs of a draft layer on ONNX Runtime's own operators.

    Args:
        directory: The bundle's graphs directory.
        shortcut: The layer, for its rotations.
    """

    def __init__(self, directory: Path, shortcut: DraftShortcut) -> None:
        self._shortcut = shortcut
        self._memory, self._layer, self._head = (
            open_portable(directory / f"{name}.onnx") for name in DRAFT_GRAPHS
        )

    def logits(self, states: Float32, tokens: list[int]) -> Float32:
        """Logits [1 + drafts, D] after the last of some positions, and after each draft.

        Args:
            states: [positions, depths H] of the model's states, from position 0 on.
            tokens: Each position's next token, then the drafts.
        """
        memory: Float32 = self._memory.run(["memory"], {"states": states})[0]
        past = [_empty(self._layer, name) for name in ("past_key", "past_value")]
        found, at = [], 0
        for count in (len(states), *[1] * (len(tokens) - len(states))):
            outputs, past = self._run(memory, tokens[at : at + count], at, past)
            memory, at = outputs[:, -1], at + count
            found.append(self._head.run(["logits"], {"hidden": memory})[0])
        return np.concatenate(found)

    def _run(self, memory: Float32, tokens: list[int], at: int, past: list[Any]) -> Any:
        cos, sin = rotations(self._shortcut.rope_theta, self._shortcut.head_dim, at, len(tokens))
        feeds = {
            "hidden": memory[None],
            "token_ids": np.array([tokens], np.int32),
            "positions": np.arange(at, at + len(tokens), dtype=np.int32)[None],
            "rotary_cos": cos[None].astype(np.float32),
            "rotary_sin": sin[None].astype(np.float32),
            "past_key": past[0],
            "past_value": past[1],
        }
        outputs, *new = self._layer.run(["hidden_out", "key", "value"], feeds)
        return outputs, [np.concatenate(both, axis=2) for both in zip(past, new, strict=True)]


def _empty(session: ort.InferenceSession, name: str) -> NDArray[Any]:
    port = next(each for each in session.get_inputs() if each.name == name)
    _, heads, _, features = port.shape
    dtype = np.float16 if port.type == "tensor(float16)" else np.float32
    return np.zeros((1, heads, 0, features), dtype)
