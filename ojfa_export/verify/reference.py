"""The independent reference: transformers' own code in fp32, one block's weights at a time.

The model is built without weights. Each module reads its own from the checkpoint just before it
runs and drops them just after, so that what is resident at most is the largest of a block, the
embedding and the head.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ojfa_export.errors import CheckpointError, OjfaError
from ojfa_export.models.checkpoint.quiet import quiet_transformers
from ojfa_export.models.families.config import QUANTISATION
from ojfa_export.models.families.tensors import HEAD, HEAD_NAMES

if TYPE_CHECKING:
    import torch

    from ojfa_export.models.checkpoint.checkpoint import Checkpoint

FloatArray = npt.NDArray[np.float32]
Visitor = Callable[[int, FloatArray], None]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def reference_of(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False
) -> TransformersReference:
    """The reference for a checkpoint, quantised or not."""
    return TransformersReference(
        checkpoint.directory,
        trust_remote_code=trust_remote_code,
        dequantised=None if checkpoint.layout is None else checkpoint,
    )


class TransformersReference:
    """A causal language model as transformers runs it, in fp32 on the CPU.

    Args:
        checkpoint: Directory in Hugging Face layout: config.json, and weights in safetensors or
            `pytorch_model.bin`, single or sharded, fp32, fp16 or bf16. Nothing is downloaded.
        trust_remote_code: Whether to run model code that lies in the checkpoint.
        dequantised: The same checkpoint, where its weights are quantised: transformers' own readers
            of them want kernels of a GPU, so it gets what the numbers stand for.

    Raises:
        CheckpointError: The config or a tensor that the model needs is missing or unreadable.
        OjfaError: torch, transformers or accelerate is not installed.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        trust_remote_code: bool = False,
        dequantised: Checkpoint | None = None,
    ) -> None:
        _require_packages()
        self._checkpoint = Path(checkpoint)
        with quiet_transformers():
            self._model = _build_without_weights(self._checkpoint, trust_remote_code)
        self._weights: _WeightFiles | _Dequantised = (
            _WeightFiles(self._checkpoint) if dequantised is None else _Dequantised(dequantised)
        )
        self._keys = _checkpoint_keys(self._model, self._weights)
        self.blocks = len(decoder_layers(self._model))

    def forward(self, token_ids: npt.NDArray[np.integer[Any]], visit: Visitor) -> FloatArray:
        """Runs the model over whole sequences, without a cache.

        Args:
            token_ids: Integers [B,S], no padding.
            visit: Called with (blocks run, hidden states float32 [B,S,H]) for 0, which is the
                first block's input, and for 1..L, each block's output before the final norm. The
                array is the model's own: it is to be read, not changed.

        Returns:
            Logits, float32 [B,S,V].

        Raises:
            CheckpointError: A tensor can't be read, or its shape is not the model's.
        """
        import torch

        # A fresh copy each time: dynamic RoPE keeps state from one call to the next.
        model = copy.deepcopy(self._model)
        layers = decoder_layers(model)
        for module, names in _units(model, layers):
            self._load_on_demand(model, module, names)
        _visit_hidden_states(layers, visit)
        tokens = torch.from_numpy(np.ascontiguousarray(token_ids, dtype=np.int64))
        with quiet_transformers(), torch.inference_mode():
            logits: FloatArray = model(input_ids=tokens, use_cache=False).logits.numpy()
        return logits

    def _load_on_demand(
        self, model: torch.nn.Module, module: torch.nn.Module, names: list[str]
    ) -> None:
        """Hooks `module` so that the parameters `names` have values only while it runs."""
        empty = {name: model.get_parameter(name) for name in names}
        keys = {name: self._keys[name] for name in names}

        def load(*_: object) -> None:
            tensors = self._weights.read(keys.values())
            for name, key in keys.items():
                _set_parameter(model, name, _fp32(tensors.pop(key), empty[name], key))

        def drop(*_: object) -> None:
            for name, meta in empty.items():
                _set_parameter(model, name, meta)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)


class _WeightFiles:
    """A checkpoint's tensors by name. A file is open only while read, so no pages stay mapped."""

    def __init__(self, checkpoint: Path) -> None:
        for name in _WEIGHT_FILES:
            if (checkpoint / name).is_file():
                self._files = dict.fromkeys(_tensor_names(checkpoint / name), checkpoint / name)
                return
            index = checkpoint / f"{name}.index.json"
            if index.is_file():
                with _reading(index):
                    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                # Only the name counts: shards are in the checkpoint, where they were checked.
                shards = sorted({checkpoint / Path(file).name for file in weight_map.values()})
                self._files = {key: path for path in shards for key in _tensor_names(path)}
                return
        raise CheckpointError(
            f"No weights in {checkpoint}.", f"It must hold {' or '.join(_WEIGHT_FILES)}."
        )

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, in the dtype they are stored in."""
        by_file = defaultdict(list)
        for key in set(keys):
            by_file[self._files[key]].append(key)
        tensors: dict[str, torch.Tensor] = {}
        for path, names in by_file.items():
            tensors |= _read_tensors(path, names)
        return tensors


class _Dequantised:
    """The tensors of a quantised checkpoint as one that isn't would have them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._readers = dict(checkpoint.plain_tensors())

    def __contains__(self, key: str) -> bool:
        return key in self._readers

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, in float32."""
        import torch

        return {
            key: torch.from_numpy(np.ascontiguousarray(self._readers[key](), np.float32))
            for key in set(keys)
        }


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what torch and safetensors raise on a bad file into a CheckpointError."""
    from safetensors import SafetensorError

    unreadable = (SafetensorError, pickle.UnpicklingError)
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, *unreadable) as error:
        raise CheckpointError(
            f"Can't read the weights in {path}: {error}", "Fetch the checkpoint again."
        ) from error


def _open_bin(path: Path) -> dict[str, torch.Tensor]:
    import torch

    # Files that torch wrote before version 1.6 are no zip archives and can't be mapped.
    tensors: dict[str, torch.Tensor] = torch.load(
        path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
    )
    return tensors


def _tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with _reading(path):
        if path.suffix == ".bin":
            return list(_open_bin(path))
        with safe_open(path, framework="pt") as file:
            return list(file.keys())


def _read_tensors(path: Path, keys: list[str]) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with _reading(path):
        if path.suffix == ".bin":
            stored = _open_bin(path)
            return {key: stored[key] for key in keys}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}


def _require_packages() -> None:
    try:
        import accelerate  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise OjfaError(
            f"Comparing with transformers needs the package {error.name}, which is not installed.",
            "pip install 'ojfa-export[verify]'",
        ) from error


def _build_without_weights(checkpoint: Path, trust_remote_code: bool) -> Any:
    """The model with parameters on the meta device; buffers (RoPE frequencies) are real."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"No config.json in {checkpoint}.", "Give a directory in Hugging Face layout."
        )
    try:
        config = AutoConfig.from_pretrained(
            os.fspath(checkpoint), local_files_only=True, trust_remote_code=trust_remote_code
        )
        if hasattr(config, QUANTISATION):  # layers are plain ones
            delattr(config, QUANTISATION)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"transformers can't build the model of {checkpoint / 'config.json'}: {error}",
            "Check config.json, or install a newer transformers.",
        ) from error
    return model.eval()


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The blocks of a model of transformers.

    Raises:
        OjfaError: They were not found.
    """
    base = model.base_model
    for attribute in ("layers", "h"):
        if hasattr(base, attribute):
            layers: torch.nn.ModuleList = getattr(base, attribute)
            return layers
    raise OjfaError(
        f"The blocks of {type(model).__name__} were not found.",
        "Supported are models whose base model holds them as `layers` or `h`.",
    )


def _units(
    model: torch.nn.Module, layers: torch.nn.ModuleList
) -> Iterator[tuple[torch.nn.Module, list[str]]]:
    """What loads together, as (module, parameter names): a decoder layer, or a module outside."""
    whole = {id(layer) for layer in layers}
    within = {id(module) for module in layers.modules()} - whole
    for name, module in model.named_modules():
        if id(module) not in within:
            parameters = module.named_parameters(name, recurse=id(module) in whole)
            if names := [parameter for parameter, _ in parameters]:
                yield module, names


def _checkpoint_keys(model: Any, weights: _WeightFiles | _Dequantised) -> dict[str, str]:
    """The name in the checkpoint of every parameter, by its name in the model.

    Files of a bare base model, GPT-2's on the hub among them, lack its prefix; a tied parameter may
    be stored under either name.
    """
    prefix = f"{model.base_model_prefix}."
    tied = {}
    if model.config.tie_word_embeddings and model.get_output_embeddings() is not None:
        names = {id(module): name for name, module in model.named_modules()}
        embedding = f"{names[id(model.get_input_embeddings())]}.weight"
        head = f"{names[id(model.get_output_embeddings())]}.weight"
        tied = {embedding: head, head: embedding}
    keys = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        for candidate in filter(None, (name, tied.get(name))):
            stored = [candidate, candidate.removeprefix(prefix)]
            if candidate == HEAD:
                stored += HEAD_NAMES
            found = next((key for key in stored if key in weights), None)
            if found is not None:
                keys[name] = found
                break
        else:
            raise CheckpointError(
                f"The checkpoint has no tensor {name}.", "Fetch the checkpoint again."
            )
    return keys


def _fp32(stored: torch.Tensor, like: torch.Tensor, key: str) -> torch.Tensor:
    import torch

    if stored.shape != like.shape:
        raise CheckpointError(
            f"The tensor {key} has shape {list(stored.shape)} where config.json asks for "
            f"{list(like.shape)}.",
            "The config and the weights must be of one model.",
        )
    return stored.to(torch.float32)


def _set_parameter(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    import torch

    owner, _, attribute = name.rpartition(".")
    parameter = torch.nn.Parameter(value, requires_grad=False)
    setattr(model.get_submodule(owner), attribute, parameter)


def _visit_hidden_states(layers: torch.nn.ModuleList, visit: Visitor) -> None:
    """Hooks the layers to call `visit` with the first one's input and with each one's output."""

    def visit_input(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(0, (args[0] if args else kwargs["hidden_states"]).numpy())

    def visit_output(blocks_run: int) -> Callable[..., None]:
        def hook(_module: object, _args: object, output: Any) -> None:
            # Some families, and transformers 4, return the hidden states first in a tuple.
            visit(blocks_run, (output[0] if isinstance(output, tuple) else output).numpy())

        return hook

    layers[0].register_forward_pre_hook(visit_input, with_kwargs=True)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(visit_output(index + 1))
