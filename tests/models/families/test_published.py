"""Configs as they are published: read without a word, and run by every backend's attention."""

from __future__ import annotations

from typing import Any

import pytest

from ojfa_export.backends.onnxruntime.dialect import check_fused_attention
from ojfa_export.errors import BackendError
from ojfa_export.models.families import read_spec
from ojfa_export.models.families.config import Config
from ojfa_export.models.spec import ModelSpec

Fields = dict[str, Any]
COMMON: Fields = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
}
GRANITE_2B: Fields = {
    **COMMON, "model_type": "granite", "architectures": ["GraniteForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_size": 2048,
    "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000000.0,
    "tie_word_embeddings": True, "vocab_size": 49155,
}  # fmt: skip
PHI4: Fields = {
    **COMMON, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "auto_map": {}, "embd_pdrop": 0.0, "eos_token_id": 100265, "hidden_size": 5120,
    "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
    "num_hidden_layers": 40, "num_key_value_heads": 10, "original_max_position_embeddings": 16384,
    "pad_token_id": 100349, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None,
    "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 100352,
}  # fmt: skip
PHI4_MINI: Fields = {
    **PHI4, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_size": 3072,
    "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
    "pad_token_id": 199999, "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope", "long_factor": [1] + [2.5] * 47, "short_factor": [1.0] * 48,
    },
    "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
GEMMA2_9B: Fields = {
    **COMMON, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_1B: Fields = {
    **COMMON, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": [1, 106], "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
STABLELM_1_6B: Fields = {
    **COMMON, "model_type": "stablelm", "architectures": ["StableLmForCausalLM"],
    "eos_token_id": 100257, "hidden_dropout": 0.0, "hidden_size": 2048, "intermediate_size": 5632,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 24, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
    "qk_layernorm": False, "rope_theta": 10000, "tie_word_embeddings": False,
    "use_parallel_residual": False, "use_qkv_bias": True, "vocab_size": 100352,
}  # fmt: skip
PYTHIA_410M: Fields = {
    **COMMON, "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 16,
    "num_hidden_layers": 24, "rotary_emb_base": 10000, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "torch_dtype": "float16", "use_parallel_residual": True,
    "vocab_size": 50304,
}  # fmt: skip
QWEN3_0_6B: Fields = {
    **COMMON, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
SMOLLM3_3B: Fields = {
    **COMMON, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False, "bos_token_id": None, "eos_token_id": 128012, "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
    "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
OLMO2_1B: Fields = {
    **COMMON, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False, "eos_token_id": 100257, "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 16, "num_key_value_heads": 16, "pad_token_id": 100277,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
    "vocab_size": 100352,
}  # fmt: skip


def spec_of(fields: Fields) -> ModelSpec:
    return read_spec(Config(fields, "config.json"))[1]


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (
            GEMMA2_9B,
            {
                "head_dim": 256,
                "attention_scales": (1 / 16,) * 42,
                "attention_softcap": 50.0,
                "logit_softcap": 30.0,
                "window": 4096,
                "windowed": (True, False) * 21,
                "tied_head": True,
            },
        ),
        (
            GEMMA3_1B,
            {
                "head_dim": 256,
                "window": 512,
                "rotated_second": (True, True, True, True, True, False) * 4 + (True, True),
                "eos_token_ids": (1, 106),
                "tied_head": True,
            },
        ),
        (GRANITE_2B, {"head_dim": 64, "rotary_dim": 64, "attention_scales": (1 / 64,) * 40}),
        (PHI4, {"head_dim": 128, "rotary_dim": 128, "rotary_switch": None, "kv_heads": 10}),
        (PHI4_MINI, {"head_dim": 128, "rotary_dim": 96, "rotary_switch": 4096, "tied_head": True}),
        (PYTHIA_410M, {"head_dim": 64, "rotary_dim": 16, "parallel": True, "norm": "layer"}),
        (QWEN3_0_6B, {"head_dim": 128, "qk_norm": "head", "window": None, "tied_head": True}),
        (SMOLLM3_3B, {"head_dim": 128, "rotated": (True, True, True, False) * 9, "window": None}),
        (OLMO2_1B, {"head_dim": 128, "norms": "after", "qk_norm": "projection"}),
        (STABLELM_1_6B, {"head_dim": 64, "rotary_dim": 16, "norm": "layer", "gated": True}),
    ],
    ids=[
        "gemma2-9b",
        "gemma3-1b",
        "granite-2b",
        "phi-4",
        "phi-4-mini",
        "pythia-410m",
        "qwen3-0.6b",
        "smollm3-3b",
        "olmo2-1b",
        "stablelm-1.6b",
    ],
)
def test_published_configs(fields: Fields, wanted: Fields) -> None:
    spec = spec_of(fields)
    check_fused_attention(spec, "")
    assert wanted.items() <= spec.model_dump().items()


def test_stablelm_3b_is_refused_by_onnx_runtime() -> None:
    """20 of the 80 features of a head rotate."""
    spec = spec_of({**STABLELM_1_6B, "hidden_size": 2560, "use_qkv_bias": False})
    assert (spec.head_dim, spec.rotary_dim) == (80, 20)
    with pytest.raises(BackendError, match="head size 80 with 20 rotated features"):
        check_fused_attention(spec, "")
