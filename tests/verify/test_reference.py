from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, VOCAB_SIZE, make_checkpoint
from tolerances import REFERENCE_FP32

from ojfa_export.errors import CheckpointError, OjfaError
from ojfa_export.verify.reference import TransformersReference

NORMS = ("norm", "ln_f", "final_layer_norm")  # what families call the final one


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**31))


@pytest.fixture
def token_ids(rng):
    return rng.integers(VOCAB_SIZE, size=(2, 40))


def run(checkpoint, token_ids):
    hidden = OrderedDict()
    logits = TransformersReference(checkpoint).forward(token_ids, hidden.__setitem__)
    return logits, hidden


@torch.inference_mode()
def expected(checkpoint, token_ids):
    """Logits, the inputs of all blocks, and the final norm's output, of the model loaded whole."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    output = model(torch.from_numpy(token_ids), use_cache=False, output_hidden_states=True)
    base = model.base_model
    norm = next(getattr(base, name) for name in NORMS if hasattr(base, name))
    return output.logits.numpy(), [h.numpy() for h in output.hidden_states], norm


def assert_equal_to_whole_model(checkpoint, token_ids):
    logits, hidden = run(checkpoint, token_ids)
    expected_logits, expected_hidden, norm = expected(checkpoint, token_ids)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits, atol=REFERENCE_FP32, rtol=0)
    assert list(hidden) == list(range(len(expected_hidden)))
    # transformers gives the last hidden state after the final norm, the reference before it.
    with torch.inference_mode():
        *inputs, last = hidden.values()
        normed = [*inputs, norm(torch.tensor(last)).numpy()]
    for ours, theirs in zip(normed, expected_hidden, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=REFERENCE_FP32, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_whole_model(name, seed, token_ids, tmp_path):
    assert_equal_to_whole_model(make_checkpoint(name, tmp_path, seed=seed), token_ids)


@pytest.mark.parametrize("name", ["gpt2-hub-keys", "llama-tied", "phi3"])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize(("dtype", "shards"), [("float16", 1), ("bfloat16", 3), ("float32", 2)])
def test_storage(name, format, dtype, shards, seed, token_ids, tmp_path):
    checkpoint = make_checkpoint(
        name, tmp_path, seed=seed, dtype=dtype, shards=shards, format=format, config_style="v4"
    )
    assert_equal_to_whole_model(checkpoint, token_ids)


def test_bin_of_old_torch(seed, token_ids, tmp_path):
    path = make_checkpoint("gpt2", tmp_path, seed=seed, format="bin") / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert_equal_to_whole_model(tmp_path, token_ids)


@pytest.mark.parametrize("name", ["llama-rope-dynamic", "phi3-longrope"])
def test_calls_are_independent(name, seed, token_ids, tmp_path):
    reference = TransformersReference(make_checkpoint(name, tmp_path, seed=seed))
    short = token_ids[:, :32]
    before = reference.forward(short, lambda *_: None)
    reference.forward(token_ids, lambda *_: None)
    np.testing.assert_array_equal(reference.forward(short, lambda *_: None), before)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama-tied", "phi3-gqa"])
def test_one_unit_in_memory(name, seed, token_ids, tmp_path):
    """At most a block or the token embedding is resident whenever any module has run."""
    checkpoint = make_checkpoint(name, tmp_path, seed=seed)
    reference = TransformersReference(checkpoint)
    resident, sizes = {}, []

    def count(module, _args, _output):
        for key, parameter in module.named_parameters(recurse=False):
            resident[id(module), key] = module, key, parameter.numel()
        sizes.append(
            sum(size for owner, k, size in resident.values() if not getattr(owner, k).is_meta)
        )

    with torch.nn.modules.module.register_module_forward_hook(count):
        reference.forward(token_ids, lambda *_: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    base = model.base_model
    block = (base.layers if hasattr(base, "layers") else base.h)[0]
    block_size = sum(parameter.numel() for parameter in block.parameters())
    embedding_size = model.get_input_embeddings().weight.numel()
    assert max(sizes) == max(block_size, embedding_size)
    assert sizes[-1] == 0


def test_prints_nothing(seed, token_ids, tmp_path, capfd):
    checkpoint = make_checkpoint("phi3-longrope", tmp_path, seed=seed)
    transformers.utils.logging.set_verbosity_info()
    try:
        capfd.readouterr()
        run(checkpoint, token_ids)
        assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.INFO
    finally:
        transformers.utils.logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def edit_weights(checkpoint, edit):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_tensor(seed, tmp_path):
    make_checkpoint("llama", tmp_path, seed=seed)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        TransformersReference(tmp_path)


def test_wrong_shape(seed, token_ids, tmp_path):
    make_checkpoint("llama", tmp_path, seed=seed)
    edit_weights(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[63\]"):
        run(tmp_path, token_ids)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_truncated_file(format, shards, seed, token_ids, tmp_path):
    make_checkpoint("llama", tmp_path, seed=seed, shards=shards, format=format)
    path = max(tmp_path.glob(f"*.{format}"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=path.name):
        run(tmp_path, token_ids)


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_missing_shard(format, seed, token_ids, tmp_path):
    make_checkpoint("llama", tmp_path, seed=seed, shards=2, format=format)
    path = max(tmp_path.glob(f"*.{format}"))
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        run(tmp_path, token_ids)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_damaged_index(text, seed, tmp_path):
    make_checkpoint("llama", tmp_path, seed=seed, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        TransformersReference(tmp_path)


def test_no_weights(seed, tmp_path):
    (make_checkpoint("llama", tmp_path, seed=seed) / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No weights"):
        TransformersReference(tmp_path)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"No config\.json"):
        TransformersReference(tmp_path / "openai-community" / "gpt2")


@pytest.mark.parametrize(
    "config", ["{", {}, {"model_type": "no-such-model"}, {"model_type": "vit"}]
)
def test_config_that_transformers_refuses(config, tmp_path):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        TransformersReference(tmp_path)


@pytest.mark.parametrize("package", ["torch", "transformers", "accelerate"])
def test_missing_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OjfaError, match=package) as caught:
        TransformersReference(tmp_path)
    assert caught.value.hint == "pip install 'ojfa-export[verify]'"


def test_importing_needs_no_torch():
    code = (
        "import sys, ojfa_export.verify.reference\n"
        "assert not {'torch', 'transformers', 'accelerate', 'safetensors'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
