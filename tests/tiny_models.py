"""Tiny random checkpoints in Hugging Face layout, one for every supported config variation.

Parameters of the same name and shape are equal in all variants made with one seed, so that where
two variants differ in their logits, the variation is the cause.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 320
POSITIONS = 128
END_OF_TEXT = "<|endoftext|>"

_COMMON = {"vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_GPT2 = {"n_positions": POSITIONS, "n_embd": 64, "n_layer": 3, "n_head": 4}
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Granite 3's own factors, but for attention's, which goes with the features of a head, and for the
# logits', whose differences would be small.
_GRANITE = {
    **_LLAMA,
    "num_key_value_heads": 2,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.15625,
    "logits_scaling": 2.0,
}
# As many features of a head, and rotating ones, as StableLM 2 1.6B has.
_STABLELM = {
    **_LLAMA,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "use_qkv_bias": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
_PHI3 = {**_LLAMA, "original_max_position_embeddings": POSITIONS}
_SHORT_FACTOR = [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8]
_LONG_FACTOR = [1.1, 1.5, 2.0, 2.6, 3.2, 4.0, 5.0, 6.0]
# What Phi-4-mini's config says beside numbers: three quarters of a head rotate, by LongRoPE, and a
# window longer than any text. Nothing reads the last five fields.
_PHI4_MINI = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "sliding_window": 262144,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": sorted(3 * _SHORT_FACTOR),
        "long_factor": sorted(3 * _LONG_FACTOR),
        "original_max_position_embeddings": 32,
    },
    "attention_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
}
_QWEN3 = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 32}
# Every second block rotates nothing.
_SMOLLM3 = {
    **_LLAMA,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "no_rope_layers": [1, 0, 1, 0],
}
# As many features of a head, and rotating ones, as most Pythia models have.
_GPT_NEOX = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "rope_parameters": _STABLELM["rope_parameters"],
}
# Caps that the scores and logits of so small a model come near to; the first and the third block
# have a window.
_GEMMA2 = {
    **_LLAMA,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 10.0,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
# One block in three has no window, and rotates by another base, stretched.
_GEMMA3 = {
    **_LLAMA,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
PLAIN = {
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _GRANITE,
    "phi3": _PHI3,
    "qwen3": _QWEN3,
    "smollm3": _SMOLLM3,
    "stablelm": _STABLELM,
}


# Families whose norms multiply by 1 + weight.
ADDS_ONE = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class Variant:
    """A checkpoint's family and what its config sets beside the plain variant of that family.

    Args:
        family: transformers' `model_type`.
        config: Config fields (in transformers 5 spelling) that differ from the plain variant.
        differs_from: The variant whose logits differ from this one's because of `config`.
        differs_beyond: Sequence length up to which the logits are those of `differs_from`.
        hub_keys: Whether tensors are named as in the GPT-2 files on the hub: no `transformer.`
            prefix, and the causal mask stored as `h.N.attn.bias`.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    differs_from: str | None = None
    differs_beyond: int = 0
    hub_keys: bool = False

    def build_config(self) -> transformers.PreTrainedConfig:
        plain = PLAIN.get(self.family, _LLAMA)
        fields = json.loads(json.dumps({**_COMMON, **plain, **self.config}))
        return transformers.AutoConfig.for_model(self.family, **fields)


def _gpt2(**config: Any) -> Variant:
    return Variant("gpt2", config, "gpt2" if config else None)


def _llama(**config: Any) -> Variant:
    return Variant("llama", config, "llama" if config else None)


def _rope(rope_type: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta, **parameters}


VARIANTS: dict[str, Variant] = {
    "gemma2": Variant("gemma2"),
    "gemma2-untied": Variant("gemma2", {"tie_word_embeddings": False}, "gemma2"),
    "gemma2-uncapped": Variant(
        "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, "gemma2"
    ),
    "gemma2-attention-capped": Variant(
        "gemma2", {"final_logit_softcapping": None}, "gemma2-uncapped"
    ),
    "gemma2-no-window": Variant(
        "gemma2", {"layer_types": ["full_attention"] * 4}, "gemma2", differs_beyond=8
    ),
    "gemma3_text": Variant("gemma3_text"),
    "gemma3_text-capped": Variant("gemma3_text", {"final_logit_softcapping": 10.0}, "gemma3_text"),
    "gemma3_text-one-base": Variant(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": _rope("default", 500.0),
                "sliding_attention": _rope("default", 500.0),
            }
        },
        "gemma3_text",
    ),
    "gemma3_text-layer-types": Variant(
        "gemma3_text",
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "gemma3_text",
    ),
    "gpt2": _gpt2(),
    "gpt2-hub-keys": Variant("gpt2", hub_keys=True),
    "gpt2-untied": _gpt2(tie_word_embeddings=False),
    "gpt2-inverse-layer-scale": _gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-no-attn-scale": _gpt2(scale_attn_weights=False),
    "gpt2-relu": _gpt2(activation_function="relu"),
    "gpt2-gelu": _gpt2(activation_function="gelu"),
    "gpt2-inner": _gpt2(n_inner=96),
    "gpt_neox": Variant("gpt_neox"),
    "gpt_neox-sequential": Variant("gpt_neox", {"use_parallel_residual": False}, "gpt_neox"),
    "granite": Variant("granite"),
    "granite-tied": Variant("granite", {"tie_word_embeddings": True}, "granite"),
    "granite-biases": Variant("granite", {"attention_bias": True, "mlp_bias": True}, "granite"),
    "granite-other-factors": Variant(
        "granite",
        {
            "embedding_multiplier": 0.7,
            "residual_multiplier": 0.5,
            "attention_multiplier": 1,
            "logits_scaling": 4,
            "tie_word_embeddings": True,
        },
        "granite-tied",
    ),
    "llama": _llama(),
    "llama-gqa": _llama(num_key_value_heads=2),
    "llama-mqa": _llama(num_key_value_heads=1),
    "llama-tied": _llama(tie_word_embeddings=True),
    "llama-head-dim": _llama(head_dim=32),
    "llama-attention-bias": _llama(attention_bias=True),
    "llama-mlp-bias": _llama(mlp_bias=True),
    "llama-rope-theta": _llama(rope_parameters=_rope("default", 500.0)),
    "llama-rope-linear": _llama(rope_parameters=_rope("linear", factor=4.0)),
    # Dynamic scaling starts beyond max_position_embeddings; here that is within POSITIONS.
    "llama-rope-dynamic": Variant(
        "llama",
        {"rope_parameters": _rope("dynamic", factor=4.0), "max_position_embeddings": 32},
        "llama",
        differs_beyond=32,
    ),
    "llama-rope-llama3": _llama(
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        )
    ),
    "mistral": Variant("mistral", {"sliding_window": None}),
    "mistral-sliding-window": Variant(
        "mistral", {"sliding_window": 8}, "mistral", differs_beyond=8
    ),
    "qwen2": Variant("qwen2", {"num_key_value_heads": 2}),
    "qwen3": Variant("qwen3"),
    # From the third layer on there is a window.
    "qwen3-sliding-window": Variant(
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        "qwen3",
        differs_beyond=8,
    ),
    "smollm3": Variant("smollm3"),
    "smollm3-sliding-window": Variant(
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 8},
        "smollm3",
        differs_beyond=8,
    ),
    "olmo2": Variant("olmo2", {"num_key_value_heads": 2}),
    "phi3": Variant("phi3"),
    "phi3-gqa": Variant("phi3", {"num_key_value_heads": 2}, "phi3"),
    "phi3-tied": Variant("phi3", {"tie_word_embeddings": True}, "phi3"),
    "phi3-sliding-window": Variant("phi3", {"sliding_window": 8}, "phi3", differs_beyond=8),
    "phi3-longrope": Variant(
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": _rope(
                "longrope",
                short_factor=_SHORT_FACTOR,
                long_factor=_LONG_FACTOR,
                original_max_position_embeddings=32,
            ),
        },
        "phi3",
    ),
    # Two heads of 32, so that the rotated half has 16 dimensions.
    "phi3-two-heads": Variant("phi3", {"num_attention_heads": 2, "num_key_value_heads": 2}, "phi3"),
    "phi3-partial-rotary": Variant(
        "phi3",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": _rope("default", partial_rotary_factor=0.5),
        },
        "phi3-two-heads",
    ),
    "phi4": Variant(
        "phi3",
        {"num_key_value_heads": 2, "rope_parameters": _rope("default", 250_000)},
        "phi3-gqa",
    ),
    "phi4-mini": Variant("phi3", _PHI4_MINI),
    "stablelm": Variant("stablelm"),
    "stablelm-gqa": Variant("stablelm", {"num_key_value_heads": 1}, "stablelm"),
    "stablelm-tied": Variant("stablelm", {"tie_word_embeddings": True}, "stablelm"),
    "stablelm-no-bias": Variant("stablelm", {"use_qkv_bias": False}, "stablelm"),
    "stablelm-half-rotary": Variant(
        "stablelm", {"rope_parameters": _rope("default", partial_rotary_factor=0.5)}, "stablelm"
    ),
}


def make_model(name: str, *, seed: int) -> transformers.PreTrainedModel:
    """The variant as a transformers model in fp32, eval mode, eager attention."""
    model = transformers.AutoModelForCausalLM.from_config(
        VARIANTS[name].build_config(), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_random_parameter(key, parameter.shape, seed))
            if "norm" in key and VARIANTS[name].family in ADDS_ONE:
                parameter.sub_(1)
    return model.eval()


def _random_parameter(key: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Values so large that a mistake in any tensor shows, so small that fp32 roundings don't."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
    values = torch.randn(shape, generator=generator)
    owner, kind = key.rsplit(".", 2)[-2:]
    if kind == "weight" and ("norm" in owner or owner.startswith("ln_")):
        return 1.0 + 0.3 * values
    if owner in ("wte", "wpe", "embed_tokens", "embed_in"):
        return 0.3 * values
    if kind == "bias":
        return 0.2 * values
    return 0.125 * values


def make_checkpoint(
    name: str,
    directory: str | Path,
    *,
    seed: int,
    dtype: str = "float32",
    shards: int = 1,
    format: Literal["safetensors", "bin"] = "safetensors",
    config_style: Literal["v4", "v5"] = "v5",
) -> Path:
    """Writes a variant's checkpoint: config.json, weights, tokenizer.json.

    Args:
        name: A key of VARIANTS.
        directory: Where to write; created if missing.
        seed: The same seed gives the same values.
        dtype: "float32", "float16" or "bfloat16", as stored.
        shards: Number of weight files; an index is written if there are several.
        format: safetensors, or torch's pickled `pytorch_model.bin`.
        config_style: Spelling of config.json: transformers 5's, or 4's as most published
            checkpoints have it (`rope_scaling`, `rope_theta`, `torch_dtype`).

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = make_model(name, seed=seed).to(getattr(torch, dtype))
    state = _stored_state(model, VARIANTS[name].hub_keys)
    with _quiet():
        model.save_pretrained(
            directory, state_dict=state, max_shard_size=_max_shard_size(state, shards)
        )
    if format == "bin":
        _convert_to_bin(directory)
    if config_style == "v4":
        _rewrite_config_as_v4(directory / "config.json")
    (directory / "generation_config.json").unlink(missing_ok=True)
    _tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def _stored_state(model: transformers.PreTrainedModel, hub_keys: bool) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if hub_keys:
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        for block in range(model.config.n_layer):
            state[f"h.{block}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
    return state


def _max_shard_size(state: dict[str, torch.Tensor], shards: int) -> int:
    """The smallest shard size in bytes, in steps of 2%, that splits `state` into `shards` files."""
    total = sum(value.nbytes for value in state.values())
    if shards == 1:
        return 2 * total
    size = math.ceil(total / shards)
    while size < total:
        files = split_torch_state_dict_into_shards(state, max_shard_size=size).filename_to_tensors
        if len(files) == shards:
            return size
        size = math.ceil(1.02 * size)
    raise ValueError(f"these tensors can't be split into {shards} files")


def _convert_to_bin(directory: Path) -> None:
    def bin_name(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for path in directory.glob("model*.safetensors"):
        torch.save(load_file(path), directory / bin_name(path.name))
        path.unlink()
    index_path = directory / "model.safetensors.index.json"
    if index_path.exists():
        index = json.loads(index_path.read_text())
        index["weight_map"] = {k: bin_name(file) for k, file in index["weight_map"].items()}
        (directory / bin_name(index_path.name)).write_text(json.dumps(index, indent=2))
        index_path.unlink()


def _rewrite_config_as_v4(path: Path) -> None:
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.41.0"
    rope = config.pop("rope_parameters", None)
    of_layers = rope is not None and "full_attention" in rope
    if of_layers:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        partial_rotary_factor = rope.pop("partial_rotary_factor", 1.0)
        if partial_rotary_factor != 1.0:
            config["partial_rotary_factor"] = partial_rotary_factor
        rope_type = rope.pop("rope_type")
        config["rope_scaling"] = None
        if rope_type != "default":
            # Files from before Llama 3.1 call it "type"; Gemma 3 came after it.
            type_key = "rope_type" if rope_type == "llama3" or of_layers else "type"
            if rope_type == "longrope":
                del rope["original_max_position_embeddings"]
            config["rope_scaling"] = {type_key: rope_type, **rope}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@functools.cache
def _tokenizer() -> Tokenizer:
    """A byte-level BPE of fewer than VOCAB_SIZE tokens, trained on Python source."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 10,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    return tokenizer


class _quiet:
    """No progress bars of transformers within the context."""

    def __enter__(self) -> None:
        self._enabled = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            transformers.utils.logging.enable_progress_bar()
