"""EAGLE-3's published drafters, read as draft layers: config.json and weights in a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ojfa_export.bundle.draft_shortcut import DraftShortcut
from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.fields import read_fields
from ojfa_export.models.checkpoint.weight_files import find_tensors, read_integers, read_tensor
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.arguments import is_whole

LAYER = "midlayer"
DEFAULT_THETA = 10_000.0
# What transformers' LlamaConfig has where a field is missing.
DEFAULT_EPSILON = 1e-6
# Beside what is read: the same as d2t, and the model's own embedding.
_NOT_READ = frozenset({"t2d", "embed_tokens.weight"})
_DEPTHS = "eagle_aux_hidden_state_layer_ids"
_ONLY: Mapping[str, Any] = {
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "norm_before_residual": False,
}
_HINT = "name a directory with an EAGLE-3 drafter of this model, made for Llama-like layers"


def read_eagle3(directory: Path, spec: ModelSpec) -> DraftShortcut:
    """Reads a drafter in EAGLE-3's public layout.

    Tensors: `fc.weight` [H, 3H], `midlayer.*` (a Llama layer whose q, k and v projections see the
    embedding and the states, 2H), `norm.weight`, `lm_head.weight` [D, H], and where D is below
    the vocabulary `d2t` [D]: token i of the head is token i + d2t[i] of the model.

    Args:
        directory: With config.json, and model.safetensors or pytorch_model.bin.
        spec: The model that it drafts for.

    Raises:
        CheckpointError: Something is missing, damaged, of another architecture, or doesn't fit.
    """
    config = read_fields(directory / "config.json")
    return _Reader(directory, config, spec).read()


class _Reader:
    def __init__(self, directory: Path, config: Mapping[str, Any], spec: ModelSpec) -> None:
        self._directory, self._config, self._spec = directory, config, spec
        self._files = find_tensors(directory)

    def read(self) -> DraftShortcut:
        self._check_architecture()
        config, hidden = self._config, self._spec.hidden_size
        heads = self._number("num_attention_heads")
        kv_heads = self._number("num_key_value_heads", heads)
        head_dim = self._number("head_dim", max(1, hidden // heads))
        width = self._number("intermediate_size")
        depths = self._depths()
        matrices = self._projections(heads * head_dim, kv_heads * head_dim)
        up = [self._matrix(f"mlp.{name}_proj", width, hidden) for name in ("gate", "up")]
        tokens, head = self._tokens_and_head()
        try:
            return DraftShortcut(
                depths=depths,
                fuse=_stored(self._tensor("fc.weight", (hidden, len(depths) * hidden)).T),
                embedding_norm=self._tensor(f"{LAYER}.input_layernorm.weight", (hidden,)),
                state_norm=self._tensor(f"{LAYER}.hidden_norm.weight", (hidden,)),
                qkv=_stored(np.concatenate(matrices, axis=1)),
                out=_stored(self._matrix("self_attn.o_proj", hidden, heads * head_dim)),
                mlp_norm=self._tensor(f"{LAYER}.post_attention_layernorm.weight", (hidden,)),
                up=_stored(np.concatenate(up, axis=1)),
                down=_stored(self._matrix("mlp.down_proj", hidden, width)),
                final_norm=self._tensor("norm.weight", (hidden,)),
                head=head,
                tokens=tokens,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope_theta=self._theta(),
                epsilon=float(config.get("rms_norm_eps", DEFAULT_EPSILON)),
            )
        except (ValueError, TypeError) as error:
            raise self._fail(str(error)) from error

    def _fail(self, detail: str) -> CheckpointError:
        return CheckpointError(f"{self._directory} is no drafter for this model: {detail}", _HINT)

    def _check_architecture(self) -> None:
        config, spec = self._config, self._spec
        named = config.get("architectures") or ["none"]
        if not (isinstance(named, list) and str(named[0]).startswith("LlamaForCausalLM")):
            raise self._fail(f"its architecture is {named}, expected LlamaForCausalLMEagle3")
        for name, wanted in (("hidden_size", spec.hidden_size), ("vocab_size", spec.vocab_size)):
            if config.get(name) != wanted:
                raise self._fail(f"its {name} is {config.get(name)}, the model's {wanted}")
        for name, only in _ONLY.items():
            if config.get(name, only) != only:
                raise self._fail(f"its {name} is {config[name]}, and only {only} can be run")
        known = {name for name in self._files if not name.startswith(LAYER)}
        known -= {"fc.weight", "norm.weight", "lm_head.weight", "d2t", *_NOT_READ}
        bias = {name for name in self._files if name.endswith(".bias")}
        if known | bias:
            raise self._fail(f"tensor '{min(known | bias)}' can't be run")

    def _number(self, name: str, missing: int | None = None) -> int:
        given: Any = self._config.get(name)
        value: Any = missing if given is None else given
        if not is_whole(value) or value < 1:
            raise self._fail(f"its {name} is {value}")
        return int(value)

    def _depths(self) -> tuple[int, ...]:
        """Blocks run before each of the states: as the config names them, else as published.

        Where it names them itself, the ids are of layers whose input is seen, as vLLM reads it;
        within `eagle_config`, of those whose output is, as SGLang does.
        """
        named = self._config.get(_DEPTHS)
        inside = self._config.get("eagle_config")
        if named is None and isinstance(inside, dict) and isinstance(inside.get(_DEPTHS), list):
            named = [each + 1 if is_whole(each) else each for each in inside[_DEPTHS]]
        if named is None:
            blocks = self._spec.blocks
            named = [2, blocks // 2, blocks - 3]
        valid = isinstance(named, list) and all(is_whole(each) for each in named)
        if not valid or not named or named != sorted(set(named)) or named[0] < 1:
            raise self._fail(
                f"the states that it sees are those after {named} of {self._spec.blocks} blocks"
            )
        if named[-1] > self._spec.blocks:
            raise self._fail(f"it sees states after {named[-1]} of {self._spec.blocks} blocks")
        return tuple(named)

    def _theta(self) -> float:
        """The base of its rotations, which must be plain ones."""
        rope = self._config.get("rope_scaling") or self._config.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise self._fail(f"its positions are rotated as '{kind}', and only plainly can be run")
        return float(rope.get("rope_theta", self._config.get("rope_theta", DEFAULT_THETA)))

    def _projections(self, queries: int, keys: int) -> list[NDArray[np.float32]]:
        seen = 2 * self._spec.hidden_size
        sizes = (("q", queries), ("k", keys), ("v", keys))
        return [self._matrix(f"self_attn.{name}_proj", size, seen) for name, size in sizes]

    def _tokens_and_head(self) -> tuple[NDArray[np.int32] | None, NDArray[np.float32] | None]:
        """Ids and head in the order of ids; none where the model's own head is used."""
        spec = self._spec
        if "lm_head.weight" not in self._files:
            if "d2t" in self._files:
                raise self._fail("it lacks tensor 'lm_head.weight'")
            return None, None
        count = self._number("draft_vocab_size", spec.vocab_size)
        head = self._tensor("lm_head.weight", (count, spec.hidden_size))
        ids = np.arange(count)
        if "d2t" in self._files:
            offsets = read_integers(self._files["d2t"], "d2t")
            if offsets.shape != (count,):
                raise self._fail(f"d2t has shape {list(offsets.shape)}, expected [{count}]")
            ids = ids + offsets
        if ids.min() < 0 or ids.max() >= spec.vocab_size or len(np.unique(ids)) < count:
            raise self._fail("d2t names tokens that the model doesn't have, or one twice")
        order = np.argsort(ids)
        return ids[order].astype(np.int32), _stored(head[order])

    def _matrix(self, name: str, outputs: int, inputs: int) -> NDArray[np.float32]:
        """A projection of the layer, input x output."""
        return self._tensor(f"{LAYER}.{name}.weight", (outputs, inputs)).T

    def _tensor(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if name not in self._files:
            raise self._fail(f"it lacks tensor '{name}'")
        array = read_tensor(self._files[name], name)
        if array.shape != shape:
            raise self._fail(
                f"tensor '{name}' has shape {list(array.shape)}, expected {list(shape)}"
            )
        return array.astype(np.float32)


def _stored(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(array)
