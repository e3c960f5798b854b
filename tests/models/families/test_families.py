"""What is read from configs, against transformers' own reading of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import POSITIONS, VARIANTS, VOCAB_SIZE
from tolerances import ROTARY_FP32
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from ojfa_export.errors import CheckpointError
from ojfa_export.models.families import FAMILIES, read_spec
from ojfa_export.models.families.config import Config
from ojfa_export.models.families.rotary import Rotary
from ojfa_export.models.families.tensors import linear, names_of, table, vector
from ojfa_export.models.families.windows import FULL, SLIDING
from ojfa_export.models.spec import LATER, ModelSpec

Fields = dict[str, Any]
ROTARY_VARIANTS = [name for name, variant in VARIANTS.items() if variant.family != "gpt2"]


def fields_of(config: transformers.PreTrainedConfig) -> Fields:
    return dict(json.loads(config.to_json_string()))


def read(fields: Fields) -> tuple[ModelSpec, Rotary | None]:
    config = Config(fields, "config.json")
    family, spec = read_spec(config)
    return spec, family.rotary(config)


def spec_of(name: str) -> ModelSpec:
    return read(fields_of(VARIANTS[name].build_config()))[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_spec_is_the_configs(name: str) -> None:
    config, spec = VARIANTS[name].build_config(), spec_of(name)
    assert spec.family == config.model_type
    assert spec.blocks == config.num_hidden_layers
    assert spec.hidden_size == config.hidden_size
    assert spec.vocab_size == config.vocab_size == VOCAB_SIZE
    assert spec.heads == config.num_attention_heads
    assert spec.kv_heads == getattr(config, "num_key_value_heads", spec.heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // spec.heads
    assert spec.head_dim == head_dim
    assert spec.max_positions == config.max_position_embeddings
    assert spec.tied_head == config.tie_word_embeddings
    assert spec.eos_token_ids == (0,)
    assert len(spec.attention_scales) == spec.blocks
    assert spec.gated == (spec.family not in ("gpt2", "gpt_neox"))
    assert (spec.norm == "layer") == (spec.family in ("gpt2", "gpt_neox", "stablelm"))
    assert spec.learned_positions == (spec.family == "gpt2")


PLAIN = {
    "gemma2": {
        "norms": "both",
        "attention_scales": (24**-0.5,) * 4,
        "attention_softcap": 2.0,
        "logit_softcap": 10.0,
        "activation": "gelu_tanh",
        "window": 8,
        "windowed": (True, False, True, False),
        "head_dim": 32,
        "tied_head": True,
    },
    "gemma3_text": {
        "norms": "both",
        "qk_norm": "head",
        "window": 8,
        "windowed": (True, True, False, True),
        "rotated_second": (True, True, False, True),
        "rotary_dim": 32,
    },
    "gpt2": {
        "intermediate_size": 256,
        "activation": "gelu_tanh",
        "attention_scales": (0.25,) * 3,
        "norm_epsilon": 1e-5,
        "tied_head": True,
        "max_positions": POSITIONS,
    },
    "gpt_neox": {"parallel": True, "activation": "gelu", "rotary_dim": 16, "kv_heads": 2},
    "granite": {"kv_heads": 2, "attention_scales": (0.15625,) * 4, "norm_epsilon": 1e-6},
    "llama": {
        "intermediate_size": 96,
        "activation": "silu",
        "kv_heads": 4,
        "rotary_dim": 16,
        "rotary_switch": None,
        "window": None,
        "norm_epsilon": 1e-6,
        "tied_head": False,
    },
    "stablelm": {
        "intermediate_size": 96,
        "activation": "silu",
        "rotary_dim": 16,
        "window": None,
        "norm_epsilon": 1e-5,
        "tied_head": False,
    },
    "phi3": {"intermediate_size": 96, "rotary_dim": 16, "window": None, "norm_epsilon": 1e-5},
    "qwen3": {"qk_norm": "head", "head_dim": 32, "rotary_dim": 32, "window": None},
    "smollm3": {"rotated": (True, False, True, False), "tied_head": True, "norm_epsilon": 1e-6},
    "olmo2": {"norms": "after", "qk_norm": "projection", "norm_epsilon": 1e-5, "kv_heads": 2},
}


@pytest.mark.parametrize("name", PLAIN)
def test_spec_of_plain_variants(name: str) -> None:
    assert PLAIN[name].items() <= spec_of(name).model_dump().items()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2-untied", {"tied_head": False}),
        ("gemma2-uncapped", {"attention_softcap": None, "logit_softcap": None}),
        ("gemma2-attention-capped", {"logit_softcap": None}),
        ("gemma2-no-window", {"window": None, "windowed": ()}),
        ("gemma3_text-capped", {"logit_softcap": 10.0}),
        ("gemma3_text-one-base", {}),
        (
            "gemma3_text-layer-types",
            {"windowed": (True, False) * 2, "rotated_second": (True, False) * 2},
        ),
        ("gpt2-hub-keys", {}),
        ("gpt2-untied", {"tied_head": False}),
        ("gpt2-inverse-layer-scale", {"attention_scales": (0.25, 0.25 / 2, 0.25 / 3)}),
        ("gpt2-no-attn-scale", {"attention_scales": (1.0,) * 3}),
        ("gpt2-relu", {"activation": "relu"}),
        ("gpt2-gelu", {"activation": "gelu"}),
        ("gpt2-inner", {"intermediate_size": 96}),
        ("granite-tied", {"tied_head": True}),
        ("granite-biases", {}),
        ("granite-other-factors", {"tied_head": True, "attention_scales": (1.0,) * 4}),
        ("llama-gqa", {"kv_heads": 2}),
        ("llama-mqa", {"kv_heads": 1}),
        ("llama-tied", {"tied_head": True}),
        (
            "llama-head-dim",
            {"head_dim": 32, "rotary_dim": 32, "attention_scales": (32**-0.5,) * 4},
        ),
        ("llama-attention-bias", {}),
        ("llama-mlp-bias", {}),
        ("llama-rope-theta", {}),
        ("llama-rope-linear", {}),
        ("llama-rope-dynamic", {"max_positions": 32}),
        ("llama-rope-llama3", {}),
        ("phi3-gqa", {"kv_heads": 2}),
        ("phi3-tied", {"tied_head": True}),
        ("phi3-sliding-window", {"window": 8}),
        ("phi3-longrope", {"rotary_switch": 32}),
        (
            "phi3-partial-rotary",
            {
                "heads": 2,
                "kv_heads": 2,
                "head_dim": 32,
                "rotary_dim": 16,
                "attention_scales": (32**-0.5,) * 4,
            },
        ),
        ("stablelm-gqa", {"kv_heads": 1}),
        ("stablelm-tied", {"tied_head": True}),
        ("stablelm-no-bias", {}),
        ("stablelm-half-rotary", {"rotary_dim": 32}),
        ("qwen3-sliding-window", {"window": 8, "windowed": (False, False, True, True)}),
        ("smollm3-sliding-window", {"window": 8, "windowed": (False, True, False, True)}),
        ("phi4", {"kv_heads": 2}),
        (
            "phi4-mini",
            {
                "hidden_size": 128,
                "heads": 2,
                "kv_heads": 1,
                "head_dim": 64,
                "rotary_dim": 48,
                "rotary_switch": 32,
                "window": 262_144,
                "tied_head": True,
                "attention_scales": (64**-0.5,) * 4,
            },
        ),
    ],
)
def test_variation_changes_only_what_it_says(name: str, changes: Fields) -> None:
    plain = spec_of(VARIANTS[name].family).model_dump()
    # What says nothing is left out of it.
    expected = {**plain, **changes}
    expected = {key: each for key, each in expected.items() if key not in LATER or each}
    assert spec_of(name).model_dump() == expected


# Rotary tables


def transformers_tables(config: Any, positions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [positions, rotary_dim/2] of transformers' own module."""
    kinds = {
        "gpt_neox": GPTNeoXRotaryEmbedding,
        "phi3": Phi3RotaryEmbedding,
        "stablelm": StableLmRotaryEmbedding,
    }
    if config.model_type == "gemma3_text":  # the second set's rows follow the first's
        rotary = Gemma3RotaryEmbedding(config)
        x = torch.zeros(1, dtype=torch.float32)
        both = [rotary(x, positions[None], kind)[:2] for kind in (FULL, SLIDING)]
        half = both[0][0].shape[-1] // 2
        cos, sin = (torch.cat(each, 1)[0, :, :half].numpy() for each in zip(*both, strict=True))
        return cos, sin
    kind = kinds.get(config.model_type, LlamaRotaryEmbedding)
    cos, sin = kind(config)(torch.zeros(1, dtype=torch.float32), positions[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize("name", ROTARY_VARIANTS)
def test_rotary_tables_are_transformers(name: str) -> None:
    config = VARIANTS[name].build_config()
    rotary = read(fields_of(config))[1]
    assert rotary is not None
    assert_tables(rotary, config, 3 * POSITIONS)


def assert_tables(rotary: Rotary, config: Any, length: int) -> None:
    positions = torch.arange(length)
    tables = rotary.tables(length)
    if rotary.kind == "dynamic":
        expected = list(transformers_tables(config, positions[: rotary.trained_length]))
        tables = tuple(each[: rotary.trained_length] for each in tables)  # type: ignore[assignment]
    elif rotary.kind == "longrope":
        assert rotary.switch_length is not None
        short = transformers_tables(config, positions[: rotary.switch_length])
        long = transformers_tables(config, positions)
        tables_long = [each[length:] for each in tables]
        for ours, theirs in zip(tables_long, long, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROTARY_FP32)
        tables = tuple(each[: rotary.switch_length] for each in tables)  # type: ignore[assignment]
        expected = list(short)
    else:
        expected = list(transformers_tables(config, positions))
    for ours, theirs in zip(tables, expected, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROTARY_FP32)


@pytest.mark.parametrize(
    ("family", "changes", "parameters"),
    [
        ("llama", {}, {"rope_type": "linear", "factor": 2.5}),
        ("llama", {"max_position_embeddings": 50}, {"rope_type": "dynamic", "factor": 2.0}),
        (
            "llama",
            {},
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.5,
                "high_freq_factor": 6.0,
                "original_max_position_embeddings": 64,
            },
        ),
        ("phi3", {}, {"rope_type": "longrope", "original_max_position_embeddings": 40}),
        ("phi3", {}, {"rope_type": "longrope", "attention_factor": 1.19, "factor": 4.0}),
        ("phi3", {}, {"rope_type": "longrope", "factor": 8.0}),
        ("phi3", {}, {"rope_type": "longrope", "partial_rotary_factor": 0.75}),
        ("phi3", {}, {"rope_type": "default", "partial_rotary_factor": 0.25}),
        ("stablelm", {}, {"rope_type": "default"}),
        ("stablelm", {"partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": 2.5}),
        ("stablelm", {"max_position_embeddings": 50}, {"rope_type": "dynamic", "factor": 2.0}),
    ],
    ids=str,
)
def test_rotary_parameters(
    family: str, changes: Fields, parameters: Fields, rng: np.random.Generator
) -> None:
    theta = float(rng.choice([500.0, 10_000.0, 500_000.0]))
    parameters = {"rope_theta": theta, **parameters}
    fields = {"max_position_embeddings": 160, **changes}
    if parameters["rope_type"] == "longrope":
        dim = int(16 * parameters.get("partial_rotary_factor", 1.0))
        for name, scale in (("short_factor", 1.0), ("long_factor", 4.0)):
            parameters[name] = (1 + scale * rng.random(dim // 2)).tolist()
        original = parameters.setdefault("original_max_position_embeddings", 48)
        fields["original_max_position_embeddings"] = original
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=None,
        rope_parameters=parameters,
        **fields,
    )
    rotary = read(fields_of(config))[1]
    assert rotary is not None
    assert rotary.kind == parameters["rope_type"]
    assert_tables(rotary, config, 200)


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, {"window": 8}),
        ("qwen3", {"sliding_window": 8, "max_window_layers": 2}, {}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 4}, {}),
        ("smollm3", {"no_rope_layers": None}, {"rotated": (True, True, True, False)}),
        (
            "smollm3",
            {"no_rope_layers": None, "no_rope_layer_interval": 2},
            {"rotated": (True, False, True, False)},
        ),
        ("smollm3", {"no_rope_layers": [1] * 6}, {"rotated": ()}),
        ("smollm3", {"tie_word_embeddings": None}, {"tied_head": True}),
    ],
)
def test_what_layers_have(name: str, changes: Fields, wanted: Fields) -> None:
    """As transformers has it where a config lists no layers."""
    fields = fields_of(VARIANTS[name].build_config())
    del fields["layer_types"]
    spec = read({**fields, "sliding_window": 8, **changes})[0]
    expected = {"window": None, "windowed": (), **wanted}
    assert {field: getattr(spec, field) for field in expected} == expected


def test_later_fields_are_left_out_where_they_say_nothing() -> None:
    later = set(LATER)
    assert not later & spec_of("llama").model_dump().keys()
    for name in ("gpt_neox", "qwen3-sliding-window", "smollm3", "olmo2", "gemma2", "gemma3_text"):
        spec = spec_of(name)
        assert later & spec.model_dump().keys()
        assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("style", ["type", "rope_type"])
def test_spelling_of_transformers_4(style: str) -> None:
    fields = fields_of(VARIANTS["llama-rope-linear"].build_config())
    expected = read(fields)
    del fields["rope_parameters"]
    old = {**fields, "rope_theta": 10_000.0, "rope_scaling": {style: "linear", "factor": 4.0}}
    assert read(old) == expected


def test_gemma_3_has_old_names_of_its_own() -> None:
    fields = fields_of(VARIANTS["gemma3_text"].build_config())
    expected = read(fields)
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del fields[name]
    old = {
        "rope_local_base_freq": 500.0,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 3,
    }
    assert read({**fields, **old}) == expected


def test_gemma_3_has_usual_bases() -> None:
    fields = fields_of(VARIANTS["gemma3_text"].build_config())
    for parameters in (None, {}, {"full_attention": {}, "sliding_attention": None}):
        rotary = read({**fields, "rope_parameters": parameters})[1]
        assert rotary is not None
        assert rotary.second is not None
        assert (rotary.theta, rotary.second.theta) == (1e6, 1e4)


def test_caps_are_usual_but_where_they_are_null() -> None:
    fields = fields_of(VARIANTS["gemma2"].build_config())
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    absent = {name: value for name, value in fields.items() if name not in names}
    null = {**fields, **dict.fromkeys(names)}
    for given, wanted in ((absent, (50.0, 30.0)), (null, (None, None))):
        spec = read(given)[0]
        assert (spec.attention_softcap, spec.logit_softcap) == wanted


def test_a_gemma_that_sees_is_refused_with_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="family 'gemma3' reads images too") as caught:
        read({"model_type": "gemma3", "text_config": {}})
    assert "'gemma3_text'" in str(caught.value.hint)


def test_gpt_neox_has_old_names_of_its_own() -> None:
    fields = fields_of(VARIANTS["gpt_neox"].build_config())
    del fields["rope_parameters"]
    rotary = read({**fields, "rotary_pct": 0.5, "rotary_emb_base": 500})[1]
    assert rotary is not None
    assert (rotary.dim, rotary.theta) == (32, 500.0)


def test_su_is_an_old_name_of_longrope() -> None:
    fields = fields_of(VARIANTS["phi3-longrope"].build_config())
    expected = read(fields)
    parameters = fields.pop("rope_parameters")
    scaling = {key: parameters[key] for key in ("short_factor", "long_factor")}
    old = {**fields, "rope_theta": 10_000.0, "rope_scaling": {"type": "su", **scaling}}
    assert read(old) == expected


# Refusals


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("gpt2", {"activation_function": "tanh"}, "activation 'tanh' is not supported"),
        ("gpt2", {"n_head": 5}, "n_embd 64 is no multiple of n_head 5"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
        ("gpt2", {"rope_theta": 1e4}, "not understood for family 'gpt2': rope_theta"),
        ("phi3", {"sliding_window": "x"}, "'sliding_window' must be a positive integer"),
        ("phi3", {"sliding_window": 0}, "'sliding_window' must be a positive integer"),
        ("phi3", {"attention_bias": True}, "'attention_bias' is True"),
        ("phi3", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not supported"),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "can't rotate in pairs"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "lacks short_factor, long_factor"),
        (
            "phi3",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 7,
                }
            },
            "'long_factor' must be a list of 8 numbers",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ("granite", {"embedding_multiplier": 0}, "'embedding_multiplier' must be a number from"),
        ("granite", {"residual_multiplier": -0.2}, "'residual_multiplier' must be a number from"),
        ("granite", {"attention_multiplier": True}, "'attention_multiplier' must be a number"),
        ("granite", {"logits_scaling": 1e5}, "'logits_scaling' must be a number from"),
        ("granite", {"logits_scaling": float("nan")}, "'logits_scaling' must be a number from"),
        ("stablelm", {"use_parallel_residual": True}, "'use_parallel_residual' is True"),
        ("stablelm", {"qk_layernorm": True}, "'qk_layernorm' is True"),
        ("stablelm", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("stablelm", {"head_dim": 32}, "'head_dim' is 32"),
        ("stablelm", {"rms_norm_eps": 1e-6}, "not understood for family 'stablelm': rms_norm_eps"),
        ("qwen3", {"layer_types": ["full_attention"]}, "'layer_types' must be a list of 4 types"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "'layer_types' is"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "'layer_types' is"),
        ("qwen3", {"max_window_layers": -1}, "'max_window_layers' must be an integer from 0 on"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "'no_rope_layers' must be a list of 4"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, "'no_rope_layers' is"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "'attn_logit_softcapping' must be a number"),
        ("gemma2", {"final_logit_softcapping": 30}, "'final_logit_softcapping' must be a real"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' must be a positive"),
        ("gemma2", {"hidden_activation": "gelu"}, "'hidden_activation' is 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "'layer_types' is"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is 50.0"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "'sliding_window_pattern' must be a posit"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "'rope_parameters' must be an"),
        ("gemma3_text", {"rope_scaling": {"factor": 2.0}}, "'rope_scaling' is"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "llama3"}}},
            "'llama3' is not supported",
        ),
        ("gpt_neox", {"hidden_act": "gelu_fast"}, "activation 'gelu_fast' is not supported"),
        ("gpt_neox", {"head_dim": 32}, "'head_dim' is 32"),
        ("olmo2", {"clip_qkv": 8.0}, "not understood for family 'olmo2': clip_qkv"),
        ("llama", {"logits_scaling": 8.0}, "not understood for family 'llama': logits_scaling"),
        ("llama", {"quantization_config": {}}, "'quantization_config' must be an object that"),
    ],
)
def test_field_that_cannot_be_honoured(name: str, changes: Fields, match: str) -> None:
    fields = fields_of(VARIANTS[name].build_config())
    with pytest.raises(CheckpointError, match=match) as caught:
        read({**fields, **changes})
    assert caught.value.message.startswith("config.json: ")
    assert caught.value.hint


def test_every_field_is_read_or_irrelevant() -> None:
    for name, variant in VARIANTS.items():
        fields = fields_of(variant.build_config())
        with pytest.raises(CheckpointError, match=r"not understood for family '.*': brand_new"):
            read({**fields, "brand_new": name})


# Tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_of_the_model_is_used_once(name: str) -> None:
    config = VARIANTS[name].build_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    reader = Config(fields_of(config), "config.json")
    family, spec = read_spec(reader)
    sources = list(family.ends(reader, spec).values())
    for index in range(spec.blocks):
        sources += family.block(reader, spec, index).values()
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    prefix = family.prefixes[0]
    for source in sources:
        for part, size in source.parts:
            key = part if part.startswith("lm_head") else prefix + part
            key = key if key in shapes else part
            assert shapes.pop(key) == source.stored_shape(size)
    assert shapes == {}


def test_sources() -> None:
    assert linear(3, ("a", 5), ("b", 7)).stored_shape(7) == (7, 3)
    assert table("t", 5, 3).stored_shape(3) == (5, 3)
    by_head = np.arange(12)  # two heads of two features: queries, keys and values of each
    wanted = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert vector("b", 12).by_head(2).join([by_head]).tolist() == wanted
    assert vector("n", 2).plus(1).times(0.5).join([np.ones(2)]).tolist() == [1, 1]
    assert linear(3, ("a", 5)).times(2).times(3).scale == 6
    assert names_of([vector("v", 2), linear(3, ("a", 5), ("b", 7))]) == ["v", "a", "b"]
    assert list(FAMILIES) == sorted(FAMILIES)
