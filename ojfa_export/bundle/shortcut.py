"""The low-rank jump from a block's output to the final hidden state, and its file."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.errors import OjfaError
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.files import check_regular
from ojfa_export.system.paths import check_utf8

# Version 2 has `gates`; files without them are still written, and read, as version 1.
FORMAT_VERSION = "2"
_WITHOUT_GATES = "1"
_TENSORS = ("scale", "shift", "down", "up")
_METADATA = ("kind", "rank", "fitted_at", "residual", "model_sha256", "format_version")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REBUILD = "Run `ojfa-export calibrate` again to make the file anew."


@dataclass(frozen=True, eq=False)
class Shortcut:
    """The jump y = ((h * scale + shift) @ down) @ up, plus h if `residual`.

    A residual jump may have gates, one for each exit: y = h + gate * ((h * scale + shift) @ down)
    @ up. Gate 0 is the identity.

    `scale` and `shift` are a BatchNorm in inference mode: its statistics and its affine
    parameters in two vectors.

    Attributes:
        scale: [H] fp32.
        shift: [H] fp32.
        down: [H, r] fp32.
        up: [r, H] fp32.
        kind: How it was fitted: "n-njtc" for one of a jump per exit, "ojfa" for the one jump
            that serves every exit, "residual" for the one that is added to h.
        fitted_at: Blocks run before the hidden states that it was fitted on, at least 1; of a jump
            that was fitted on all levels together, the first.
        residual: Whether h is added to the output.
        gates: [L-1] fp32 for exits 1..L-1, or None; only of a residual jump.

    Raises:
        ValueError: Arrays of another dtype, of shapes that do not fit together, or not finite.
    """

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    down: NDArray[np.float32]
    up: NDArray[np.float32]
    kind: str
    fitted_at: int
    residual: bool = False
    gates: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.down.ndim != 2:
            raise ValueError(f"down has shape {self.down.shape}, expected [H, r]")
        hidden, rank = self.down.shape
        if not 1 <= rank <= hidden:
            raise ValueError(f"rank {rank} is outside 1..{hidden}")
        if self.gates is not None and not self.residual:
            raise ValueError("gates are for a residual jump")
        self._check_arrays(hidden, rank)
        if not self.kind:
            raise ValueError("kind is empty")
        if self.fitted_at < 1:
            raise ValueError(f"fitted_at is {self.fitted_at}, expected at least 1")

    def _check_arrays(self, hidden: int, rank: int) -> None:
        expected: dict[str, tuple[int, ...]] = {
            "scale": (hidden,),
            "shift": (hidden,),
            "down": (hidden, rank),
            "up": (rank, hidden),
        }
        if self.gates is not None:
            expected["gates"] = (max(1, self.gates.size),)
        for name, shape in expected.items():
            array: NDArray[Any] = getattr(self, name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
            if array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype}, expected float32")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has values that are NaN or infinite")

    @property
    def hidden_size(self) -> int:
        """H, the length of a hidden state."""
        return int(self.down.shape[0])

    @property
    def rank(self) -> int:
        """r, the number of directions that pass through the jump."""
        return int(self.down.shape[1])

    @property
    def parameters(self) -> int:
        """The number of stored weights, 2 H r + 2 H, and the gates."""
        gates = 0 if self.gates is None else self.gates.size
        return self.scale.size + self.shift.size + self.down.size + self.up.size + gates

    def apply(self, h: NDArray[Any], blocks_run: int | None = None) -> NDArray[Any]:
        """Predicts the last block's output, before the final norm.

        Args:
            h: [..., H] hidden states after some block, any float dtype.
            blocks_run: After which block, 1..L-1; a jump with gates needs to know.

        Returns:
            [..., H], float64 for float64 input and float32 otherwise.

        Raises:
            ValueError: A jump with gates, and no exit that it has a gate for.
        """
        y = ((h * self.scale + self.shift) @ self.down) @ self.up
        if not self.residual:
            return y
        return h + self.gate(blocks_run) * y

    def gate(self, blocks_run: int | None) -> np.float32:
        """The gate of an exit, 1 for a jump without gates.

        Raises:
            ValueError: A jump with gates, and no exit that it has a gate for.
        """
        if self.gates is None:
            return np.float32(1)
        if blocks_run is None or not 1 <= blocks_run <= self.gates.size:
            raise ValueError(f"no gate for exit {blocks_run}, only for 1..{self.gates.size}")
        gate: np.float32 = self.gates[blocks_run - 1]
        return gate


def save(shortcut: Shortcut, path: Path, model_sha256: str) -> None:
    """Writes a shortcut as safetensors; the same shortcut gives the same bytes.

    The header is written here because the safetensors library keeps metadata in a hash map,
    whose order, and so the file's bytes, may differ from run to run.

    Args:
        shortcut: What to write.
        path: The file, written whole or not at all.
        model_sha256: Digest of the checkpoint that the shortcut belongs to, 64 hex digits.

    Raises:
        ValueError: `model_sha256` is not a SHA-256 digest in lower-case hex.
    """
    if not _SHA256.fullmatch(model_sha256):
        raise ValueError(f"model_sha256 {model_sha256!r} is not 64 lower-case hex digits")
    header: dict[str, Any] = {
        "__metadata__": {
            "kind": shortcut.kind,
            "rank": str(shortcut.rank),
            "fitted_at": str(shortcut.fitted_at),
            "residual": "true" if shortcut.residual else "false",
            "model_sha256": model_sha256,
            "format_version": _WITHOUT_GATES if shortcut.gates is None else FORMAT_VERSION,
        }
    }
    body = b""
    for name in _TENSORS if shortcut.gates is None else (*_TENSORS, "gates"):
        array: NDArray[np.float32] = getattr(shortcut, name)
        start = len(body)
        body += array.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [start, len(body)],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    write_atomically(path, struct.pack("<Q", len(text)) + text + body)


def load(path: Path) -> tuple[Shortcut, str]:
    """Reads a shortcut file.

    Returns:
        The shortcut, and the digest of the checkpoint that it belongs to.

    Raises:
        OjfaError: No such file, not safetensors, of another format version, or with missing or
            contradictory metadata, tensors, shapes or values.
    """
    check_utf8(path)
    tensors, metadata = _read_safetensors(path)
    version = metadata.get("format_version")
    if version is not None and version not in (_WITHOUT_GATES, FORMAT_VERSION):
        raise OjfaError(
            f"{path} has shortcut format version {version!r}, this release reads "
            f"{_WITHOUT_GATES} and {FORMAT_VERSION}.",
            hint="Use the release of ojfa-export that wrote the file, or calibrate again.",
        )
    missing = [name for name in _METADATA if name not in metadata]
    names = (*_TENSORS, "gates") if version == FORMAT_VERSION else _TENSORS
    missing += [name for name in names if name not in tensors]
    if missing:
        raise OjfaError(f"{path} is no shortcut: it lacks {', '.join(missing)}.", hint=_REBUILD)
    unknown = sorted(tensors.keys() - set(names))
    if unknown:
        raise OjfaError(f"{path} holds unknown tensors: {', '.join(unknown)}.", hint=_REBUILD)
    try:
        shortcut = Shortcut(
            **{name: tensors[name] for name in names},
            kind=metadata["kind"],
            fitted_at=int(metadata["fitted_at"]),
            residual={"true": True, "false": False}[metadata["residual"]],
        )
        if int(metadata["rank"]) != shortcut.rank:
            raise ValueError(f"metadata says rank {metadata['rank']}, down has {shortcut.rank}")
        if not _SHA256.fullmatch(metadata["model_sha256"]):
            raise ValueError("model_sha256 is not 64 lower-case hex digits")
    except KeyError as error:
        raise OjfaError(
            f"{path} has residual {error.args[0]!r} in its metadata, expected true or false.",
            hint=_REBUILD,
        ) from error
    except ValueError as error:
        raise OjfaError(f"{path} is not a valid shortcut: {error}.", hint=_REBUILD) from error
    return shortcut, metadata["model_sha256"]


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype NumPy lacks
        raise OjfaError(
            f"{path} can't be read as a shortcut: {error}.",
            hint="Check the path; " + _REBUILD[0].lower() + _REBUILD[1:],
        ) from error
