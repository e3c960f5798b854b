"""The file of a shortcut: safetensors, the same bytes for the same shortcut."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.block_shortcut import OPTIONAL, WEIGHTS, BlockShortcut
from ojfa_export.bundle.draft_shortcut import DraftShortcut
from ojfa_export.bundle.mlp_shortcut import MlpShortcut
from ojfa_export.bundle.shortcut import Shortcut
from ojfa_export.errors import OjfaError
from ojfa_export.models.spec import Activation, NormKind
from ojfa_export.system.atomic import write_atomically
from ojfa_export.system.files import check_regular
from ojfa_export.system.paths import check_utf8

# Takes an exit's hidden states to the model's head, each by itself.
RowShortcut = Shortcut | MlpShortcut
# The same, or with those of the tokens before.
ExitShortcut = RowShortcut | BlockShortcut
AnyShortcut = ExitShortcut | DraftShortcut

# Version 1 is a low-rank jump, version 2 has `gates` as well, version 3 is an MLP, version 4 a
# draft layer, version 5 a block, or one for each exit.
LOW_RANK, WITH_GATES, MLP, DRAFT, BLOCK = "1", "2", "3", "4", "5"
_TENSORS: Mapping[str, tuple[str, ...]] = {
    LOW_RANK: ("scale", "shift", "down", "up"),
    WITH_GATES: ("scale", "shift", "down", "up", "gates"),
    MLP: ("scale", "shift", "up", "down"),
    DRAFT: (
        *("fuse", "embedding_norm", "state_norm", "qkv", "out", "mlp_norm", "up", "down"),
        "final_norm",
    ),
    BLOCK: ("scale", "shift", *WEIGHTS),
}
# Of a draft both or none.
_OPTIONAL: Mapping[str, tuple[str, ...]] = {DRAFT: ("head", "tokens"), BLOCK: OPTIONAL}
_METADATA: Mapping[str, tuple[str, ...]] = {
    LOW_RANK: ("kind", "rank", "fitted_at", "residual", "model_sha256", "format_version"),
    WITH_GATES: ("kind", "rank", "fitted_at", "residual", "model_sha256", "format_version"),
    MLP: ("kind", "norm", "epsilon", "activation", "gate", "model_sha256", "format_version"),
    DRAFT: (
        *("kind", "depths", "heads", "kv_heads", "head_dim", "rope_theta", "epsilon"),
        *("model_sha256", "format_version"),
    ),
    BLOCK: ("kind", "exits", "model_sha256", "format_version"),
}
_TRUTH = {"true": True, "false": False}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REBUILD = "Run `ojfa-export calibrate` or `ojfa-export train` again to make the file anew."


def save(
    shortcut: AnyShortcut,
    path: Path,
    model_sha256: str,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a shortcut as safetensors; the same shortcut gives the same bytes.

    The header is written here because the safetensors library keeps metadata in a hash map,
    whose order, and so the file's bytes, may differ from run to run.

    Args:
        shortcut: What to write.
        path: The file, written whole or not at all.
        model_sha256: Digest of the checkpoint that the shortcut belongs to, 64 hex digits.
        training: How it was trained, for people: kept as JSON beside the rest, read by nothing.

    Raises:
        ValueError: `model_sha256` is not a SHA-256 digest in lower-case hex.
    """
    if not _SHA256.fullmatch(model_sha256):
        raise ValueError(f"model_sha256 {model_sha256!r} is not 64 lower-case hex digits")
    version, described = _described(shortcut)
    described |= {"model_sha256": model_sha256, "format_version": version}
    if training is not None:
        described["training"] = json.dumps(training)
    header: dict[str, Any] = {"__metadata__": described}
    body: list[bytes] = []
    stop = 0
    stored = vars(shortcut) | getattr(shortcut, "weights", {})
    for name in (*_TENSORS[version], *_OPTIONAL.get(version, ())):
        array: NDArray[Any] | None = stored.get(name)
        if array is None:
            continue
        whole = array.dtype == np.int32
        body.append(array.astype("<i4" if whole else "<f4").tobytes())
        start, stop = stop, stop + len(body[-1])
        header[name] = {
            "dtype": "I32" if whole else "F32",
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    write_atomically(path, b"".join([struct.pack("<Q", len(text)), text, *body]))


def _described(shortcut: AnyShortcut) -> tuple[str, dict[str, str]]:
    """The format version, and what the tensors don't say."""
    if isinstance(shortcut, MlpShortcut):
        return MLP, {
            "kind": shortcut.kind,
            "norm": shortcut.norm,
            "epsilon": repr(shortcut.epsilon),
            "activation": shortcut.activation,
            "gate": _word(shortcut.gate),
        }
    if isinstance(shortcut, DraftShortcut):
        numbers = ("heads", "kv_heads", "head_dim", "rope_theta", "epsilon")
        return DRAFT, {
            "kind": shortcut.kind,
            "depths": ",".join(map(str, shortcut.depths)),
            **{name: repr(getattr(shortcut, name)) for name in numbers},
        }
    if isinstance(shortcut, BlockShortcut):
        return BLOCK, {"kind": shortcut.kind, "exits": ",".join(map(str, shortcut.exits))}
    return LOW_RANK if shortcut.gates is None else WITH_GATES, {
        "kind": shortcut.kind,
        "rank": str(shortcut.rank),
        "fitted_at": str(shortcut.fitted_at),
        "residual": _word(shortcut.residual),
    }


def _word(truth: bool) -> str:
    return "true" if truth else "false"


def load(path: Path) -> tuple[AnyShortcut, str]:
    """Reads a shortcut file.

    Returns:
        The shortcut, and the digest of the checkpoint that it belongs to.

    Raises:
        OjfaError: No such file, not safetensors, of another format version, or with missing or
            contradictory metadata, tensors, shapes or values.
    """
    check_utf8(path)
    tensors, metadata = _read_safetensors(path)
    version = metadata.get("format_version", LOW_RANK)
    if version not in _TENSORS:
        raise OjfaError(
            f"{path} has shortcut format version {version!r}, this release reads "
            f"{', '.join(_TENSORS)}.",
            hint="Use the release of ojfa-export that wrote the file, or calibrate again.",
        )
    names = _TENSORS[version]
    missing = [name for name in _METADATA[version] if name not in metadata]
    missing += [name for name in names if name not in tensors]
    if missing:
        raise OjfaError(f"{path} is no shortcut: it lacks {', '.join(missing)}.", hint=_REBUILD)
    optional = _OPTIONAL.get(version, ())
    unknown = sorted(tensors.keys() - {*names, *optional})
    if unknown:
        raise OjfaError(f"{path} holds unknown tensors: {', '.join(unknown)}.", hint=_REBUILD)
    try:
        make = {MLP: _mlp, DRAFT: _draft, BLOCK: _block}.get(version, _low_rank)
        given: dict[str, Any] = {name: tensors[name] for name in names}
        shortcut = make(given | {name: tensors.get(name) for name in optional}, metadata)
        if not _SHA256.fullmatch(metadata["model_sha256"]):
            raise ValueError("model_sha256 is not 64 lower-case hex digits")
    except ValueError as error:
        raise OjfaError(f"{path} is not a valid shortcut: {error}.", hint=_REBUILD) from error
    return shortcut, metadata["model_sha256"]


def load_exit(path: Path) -> tuple[ExitShortcut, str]:
    """Reads the file of a jump that serves exits; see `load`.

    Raises:
        OjfaError: As of `load`, or it is a draft layer.
    """
    shortcut, of_model = load(path)
    if isinstance(shortcut, DraftShortcut):
        raise OjfaError(
            f"{path} is a draft layer, where a jump of exits is needed.",
            hint="Give one of kind residual, mlp or block.",
        )
    return shortcut, of_model


def exits_of(shortcut: ExitShortcut, blocks: int) -> tuple[int, ...]:
    """The exits that a shortcut serves in a model of so many blocks."""
    return shortcut.exits if isinstance(shortcut, BlockShortcut) else tuple(range(1, blocks))


def _low_rank(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> AnyShortcut:
    shortcut = Shortcut(
        **tensors,
        kind=metadata["kind"],
        fitted_at=int(metadata["fitted_at"]),
        residual=_TRUTH[_one_of(metadata, "residual", tuple(_TRUTH))],
    )
    if int(metadata["rank"]) != shortcut.rank:
        raise ValueError(f"metadata says rank {metadata['rank']}, down has {shortcut.rank}")
    return shortcut


def _mlp(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> AnyShortcut:
    _one_of(metadata, "kind", ("mlp",))
    return MlpShortcut(
        **tensors,
        norm=_one_of(metadata, "norm", get_args(NormKind)),
        epsilon=float(metadata["epsilon"]),
        activation=_one_of(metadata, "activation", get_args(Activation)),
        gate=_TRUTH[_one_of(metadata, "gate", tuple(_TRUTH))],
    )


def _draft(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> AnyShortcut:
    _one_of(metadata, "kind", ("draft",))
    return DraftShortcut(
        **tensors,
        depths=tuple(map(int, metadata["depths"].split(","))),
        heads=int(metadata["heads"]),
        kv_heads=int(metadata["kv_heads"]),
        head_dim=int(metadata["head_dim"]),
        rope_theta=float(metadata["rope_theta"]),
        epsilon=float(metadata["epsilon"]),
    )


def _block(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> AnyShortcut:
    _one_of(metadata, "kind", ("block",))
    return BlockShortcut(
        exits=tuple(map(int, metadata["exits"].split(","))),
        scale=tensors["scale"],
        shift=tensors["shift"],
        weights={
            name: tensors[name] for name in (*WEIGHTS, *OPTIONAL) if tensors[name] is not None
        },
    )


def _one_of(metadata: Mapping[str, str], name: str, known: tuple[str, ...]) -> Any:
    if metadata[name] not in known:
        raise ValueError(f"{name} is {metadata[name]!r}, expected {' or '.join(known)}")
    return metadata[name]


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
