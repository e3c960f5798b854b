"""A model repository for NVIDIA's Triton Inference Server: a bundle, and what runs it there.

REPOSITORY/NAME/config.pbtxt      inputs, outputs, and how the engine is made
REPOSITORY/NAME/1/model.py        imports `serving.triton_model` from Triton's Python
REPOSITORY/NAME/1/bundle.ojfa     the bundle, or a link to it
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ojfa_export import backends
from ojfa_export.bundle.bundle import Bundle
from ojfa_export.decoding.exits import Exit
from ojfa_export.errors import UsageError
from ojfa_export.runtime.model import load
from ojfa_export.system.paths import check_utf8
from ojfa_export.system.publish import publish, recover

BUNDLE, CONFIG = "bundle.ojfa", "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MODEL = '''"""Triton's Python needs ojfa-export: pip install 'ojfa-export[serve]'."""

from ojfa_export.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# By name: Triton's type and shape. All inputs may be left out; `triton_model` says what they mean.
INPUTS = {
    "text_input": ("TYPE_STRING", 1),
    "input_ids": ("TYPE_INT32", -1),
    "messages": ("TYPE_STRING", 1),
    "max_tokens": ("TYPE_INT32", 1),
    "temperature": ("TYPE_FP32", 1),
    "seed": ("TYPE_INT64", 1),
    "exit": ("TYPE_STRING", 1),
    "options": ("TYPE_STRING", 1),
    "stream": ("TYPE_BOOL", 1),
}
OUTPUTS = {
    "text_output": ("TYPE_STRING", 1),
    "token_ids": ("TYPE_INT32", -1),
    "blocks_run": ("TYPE_INT32", -1),
    "finish_reason": ("TYPE_STRING", 1),
}


@dataclass(frozen=True)
class TritonSettings:
    """How Triton's model makes its engine; parameters of its configuration.

    Attributes:
        backend: Engines to run; on any but the default one each GPU gets an instance.
        max_sequences: Requests that run at once.
        kv_cache: Memory for keys and values in bytes; None for what they may need.
        max_queue: Requests that wait.
        timeout: Seconds that a request may take.
        exit: Blocks to run where a request doesn't say.
    """

    backend: str = backends.DEFAULT
    max_sequences: int = 16
    kv_cache: int | None = None
    max_queue: int = 256
    timeout: float = 600.0
    exit: Exit | str = "full"


def write_repository(
    bundle: Path,
    repository: Path,
    settings: TritonSettings,
    *,
    name: str | None = None,
    link: bool = False,
    overwrite: bool = False,
) -> Path:
    """Adds a bundle to a repository, which is made where there is none.

    Args:
        bundle: Its directory.
        repository: Holds a directory for each model.
        settings: Of the engine.
        name: Of the model; by default the bundle's, without `.ojfa`.
        link: Whether the bundle stays where it is, and a link leads there.
        overwrite: Whether to replace a model of this name.

    Returns:
        The model's directory, which appears whole or not at all.

    Raises:
        UsageError: The name is taken, or can't be one.
        OjfaError: The bundle can't be opened, or lacks what the settings ask for.
    """
    name = bundle.resolve().name.removesuffix(".ojfa") if name is None else name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a model of Triton can't be called {name!r}", hint="choose letters and digits: --name"
        )
    target = repository / name
    _check_free(target, overwrite)
    load(bundle, backend=settings.backend).resolve_exit(settings.exit)  # type: ignore[arg-type]
    repository.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Not in the repository itself, where Triton would take it for a model.
    place = repository if repository.is_mount() else repository.absolute().parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f"{repository.absolute().name}.") as work:
        model = Path(work) / name
        version = model / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        (model / CONFIG).write_text(config(name, settings), encoding="utf-8")
        if link:
            (version / BUNDLE).symlink_to(bundle.resolve(), target_is_directory=True)
        else:
            shutil.copytree(bundle, version / BUNDLE)
            Bundle(version / BUNDLE)  # a bad copy is found here and not in Triton
        repository.mkdir(exist_ok=True)
        _check_free(target, overwrite)  # it may have come to be meanwhile
        publish(model, target)
    return target


def config(name: str, settings: TritonSettings) -> str:
    """The text of config.pbtxt."""
    kind = "KIND_CPU" if settings.backend == backends.DEFAULT else "KIND_GPU"
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        "max_batch_size: 0  # the engine batches",
        "model_transaction_policy { decoupled: true }",
        f"instance_group [ {{ kind: {kind}, count: 1 }} ]",
    ]
    for input, (type, length) in INPUTS.items():
        lines.append(_tensor("input", input, type, length, ", optional: true"))
    lines += [_tensor("output", output, *of) for output, of in OUTPUTS.items()]
    for key, value in vars(settings).items():
        if value is not None:
            text = f'key: "{key}", value: {{ string_value: "{value}" }}'
            lines.append(f"parameters {{ {text} }}")
    return "\n".join(lines) + "\n"


def _tensor(kind: str, name: str, type: str, length: int, more: str = "") -> str:
    return f'{kind} {{ name: "{name}", data_type: {type}, dims: [ {length} ]{more} }}'


def _check_free(target: Path, overwrite: bool) -> None:
    check_utf8(target)
    recover(target)
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UsageError(
            f"{target} exists already", hint="choose another --name, or add --overwrite"
        )
    if not (target / CONFIG).is_file():
        raise UsageError(
            f"{target} exists and holds no {CONFIG}: it is not overwritten",
            hint="choose another --name",
        )
