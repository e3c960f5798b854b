from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_models import POSITIONS, VARIANTS, VOCAB_SIZE, make_checkpoint, make_model
from tokenizers import Tokenizer
from tolerances import LOGITS_FP32


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**31))


@pytest.fixture
def token_ids(rng):
    """At lengths beyond every original length, within every learned position table."""
    return torch.from_numpy(rng.integers(VOCAB_SIZE, size=(1, 48)))


def load(directory):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@torch.inference_mode()
def logits_of(model, token_ids):
    return model(token_ids, use_cache=False).logits


@pytest.mark.parametrize("config_style", ["v4", "v5"])
@pytest.mark.parametrize("name", VARIANTS)
def test_loads_as_written(name, config_style, seed, token_ids, tmp_path):
    directory = make_checkpoint(name, tmp_path, seed=seed, config_style=config_style)
    loaded = logits_of(load(directory), token_ids)
    assert torch.equal(loaded, logits_of(make_model(name, seed=seed), token_ids))
    config = json.loads((directory / "config.json").read_text())
    v4_only, v5_only = {"torch_dtype", "rope_theta"}, {"dtype", "rope_parameters"}
    assert not config.keys() & (v5_only if config_style == "v4" else v4_only)


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.differs_from])
def test_variation_matters(name, seed, token_ids):
    variant = VARIANTS[name]
    plain = make_model(variant.differs_from, seed=seed)
    varied = make_model(name, seed=seed)
    # The short sequence first: dynamic RoPE keeps its stretched frequencies after a long one.
    short = token_ids[:, : variant.differs_beyond]
    if short.shape[1]:
        torch.testing.assert_close(
            logits_of(varied, short), logits_of(plain, short), atol=LOGITS_FP32, rtol=0
        )
    difference = (logits_of(plain, token_ids) - logits_of(varied, token_ids)).abs()
    # The tanh form of GELU is within 5e-4 of the exact one; all else makes other logits.
    assert difference[:, -1].max() > (2 * LOGITS_FP32 if name == "gpt2-gelu" else 0.02)


def test_longrope_has_two_lengths(seed, token_ids):
    model = make_model("phi3-longrope", seed=seed)
    short, long = logits_of(model, token_ids[:, :32]), logits_of(model, token_ids[:, :33])
    assert (short - long[:, :32]).abs().max() > 0.02


@pytest.mark.parametrize("name", ["gpt2", "llama-attention-bias", "phi3-gqa"])
def test_every_tensor_matters(name, seed, token_ids):
    model = make_model(name, seed=seed)
    before = logits_of(model, token_ids)
    for key, parameter in model.named_parameters():
        if "k_proj.bias" in key:
            continue  # softmax is blind to it but for its rotation
        original = parameter.data.clone()
        parameter.data.mul_(1.1)
        assert (logits_of(model, token_ids) - before).abs().max() > 1e-3, key
        parameter.data.copy_(original)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_formats(format, shards, dtype, seed, tmp_path):
    directory = make_checkpoint(
        "llama-tied", tmp_path, seed=seed, dtype=dtype, shards=shards, format=format
    )
    suffix = {"safetensors": ".safetensors", "bin": ".bin"}[format]
    assert len(list(directory.glob(f"*{suffix}"))) == shards
    assert len(list(directory.glob("*.index.json"))) == (shards > 1)
    model = load(directory)
    assert model.dtype == getattr(torch, dtype)
    loaded = model.state_dict()
    for key, value in make_model("llama-tied", seed=seed).state_dict().items():
        assert torch.equal(loaded[key], value.to(model.dtype)), key


def test_tokenizer(seed, tmp_path):
    directory = make_checkpoint("gpt2", tmp_path, seed=seed)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert 300 <= tokenizer.get_vocab_size() <= VOCAB_SIZE
    text = "def parse(self, argument):\n    return 'é漢'\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < min(len(text.encode()), POSITIONS)
